"""Files `test_triton_*` need Triton's interpreter, which must be on before triton is imported.

They are collected in a process of their own only: `test_interpreted.py` starts it, or run them directly with
`TRITON_INTERPRET=1 python -m pytest tests/kernels`.
"""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    collect_ignore_glob = ["test_interpreted.py", "test_compiled.py"]
    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 takes the number of an array with one element in a way that NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index
else:
    collect_ignore_glob = ["test_triton_*.py"]
