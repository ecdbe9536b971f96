"""The engine: ask questions of whole documents with any rotary decoder of transformers.

Importing this package loads nothing; each name is loaded with its first use, torch and transformers with `QLLM`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which takes longer to import than the rest
if TYPE_CHECKING:
    from typing import Any

    from qllm_runtime.config import MemoryConfig
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM
    from qllm_runtime.errors import QLLMError
    from qllm_runtime.types import Answer, Document, Piece, Sampling, Source, Turn

__version__ = "0.1.0"
__all__ = [
    "QLLM", "Answer", "Document", "DocumentMemory", "MemoryConfig", "Piece", "QLLMError", "Sampling", "Source", "Turn",
]  # fmt: skip
_HOMES = {"QLLM": "engine", "DocumentMemory": "document_memory", "MemoryConfig": "config", "QLLMError": "errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'types')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
