"""Documents that were read once and can be asked many times."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qllm_runtime.errors import ClosedError, InvalidRequestError
from qllm_runtime.types import Document, Progress

if TYPE_CHECKING:
    from qllm_runtime.cache import MemoryCache
    from qllm_runtime.config import MemoryConfig
    from qllm_runtime.inference import Inference
    from qllm_runtime.prompt import Prompt


class DocumentMemory:
    """Key/value memory of documents, made by `QLLM.read`.

    Any number of questions may be asked of it, from any number of threads; each one continues on a fork that shares the
    blocks and leaves this memory as it was. Its blocks are freed by `close()`, at the end of a `with` block, or when it is
    garbage-collected.

    Attributes:
        id: Unique name.
        documents: What was read.
        system: System text that was read ahead of the documents.
        config: Layout of the blocks; questions are answered with it.
        template_kwargs: Variables of the chat template that were set.
        n_tokens: Tokens read.
    """

    def __init__(
        self,
        documents: tuple[Document, ...],
        system: str | None,
        prompt: Prompt,
        cache: MemoryCache,
        inference: Inference,
        config: MemoryConfig,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self.id = f"mem-{uuid.uuid4().hex[:16]}"
        self.documents = documents
        self.system = system
        self.config = config
        self.template_kwargs = dict(template_kwargs)
        self.n_tokens = len(prompt.ids)
        self._prompt = prompt
        self._cache: MemoryCache | None = cache
        self._inference: Inference | None = inference

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"DocumentMemory(id={self.id!r}, documents={len(self.documents)}, n_tokens={self.n_tokens}{state})"

    @property
    def closed(self) -> bool:
        """Whether its blocks were freed."""
        return self._cache is None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and summaries on the model's device, without blocks that `device_blocks` keeps on the host."""
        cache = self._cache
        return 0 if cache is None else cache.nbytes()

    def contents(self, inference: Inference) -> tuple[Prompt, MemoryCache]:
        """The prompt that was read and its memories, for a request to the model behind `inference`.

        Raises:
            ClosedError: The memory was closed.
            InvalidRequestError: It was read by another model.
        """
        cache = self._cache  # another thread may close this memory meanwhile
        if cache is None:
            raise self._was_closed()
        if inference is not self._inference:
            raise InvalidRequestError(
                f"Document memory {self.id} was read by another model; read the documents with this one."
            )
        return self._prompt, cache

    def save(self, path: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
        """Write it to a folder, for `QLLM.load_memory` in another process or on another day; texts are part of it.

        Keys and values take their size in the model's dtype: about `nbytes`, more with `device_blocks`. A reading that is in
        the folder already is replaced when the new one is whole.

        Args:
            path: The folder; it need not be there.
            progress: Called with (layers written, layers in all).

        Raises:
            SavedReadingError: The folder cannot be written, holds something else, or does not fit on the disk.
            InvalidRequestError: Metadata that JSON cannot hold, or a memory in faithful mode.
            ClosedError: The memory was closed.
        """
        from qllm_runtime import saving

        inference = self._inference
        if inference is None:
            raise self._was_closed()
        with inference.request():
            saving.write(Path(path), self, inference, progress)

    def _was_closed(self) -> ClosedError:
        return ClosedError(f"Document memory {self.id} was closed; read the documents again.")

    def close(self) -> None:
        """Free the blocks. Answers under way still finish."""
        self._cache = self._inference = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
