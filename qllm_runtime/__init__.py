"""The engine: ask questions of whole documents with any rotary decoder of transformers.

Importing this package loads neither torch nor transformers; the engine is loaded with the first use of `QLLM`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import QLLMError
from qllm_runtime.types import Answer, Document, Piece, Sampling, Source, Turn

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM

__version__ = "0.1.0"
__all__ = [
    "QLLM", "Answer", "Document", "DocumentMemory", "MemoryConfig", "Piece", "QLLMError", "Sampling", "Source", "Turn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "QLLM":
        from qllm_runtime.engine import QLLM

        return QLLM
    if name == "DocumentMemory":
        from qllm_runtime.document_memory import DocumentMemory

        return DocumentMemory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
