"""Files `test_triton_*` need Triton's interpreter, which must be on before triton is imported.

They are collected in a process of their own only: `test_interpreted.py` starts it, or run them directly with
`TRITON_INTERPRET=1 python -m pytest tests/kernels`.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_interpreted.py", "test_compiled.py"]
else:
    collect_ignore_glob = ["test_triton_*.py"]
