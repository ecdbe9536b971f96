"""Streaming responses whose sources are known when the answer is."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.schema import NodeWithScore

from qllm_integrations.llama_index.asking import Sources

# never seen: keeps metadata that wait for the answer from being an empty dict, which json writes without reading it
_PENDING = "\0pending"


class _OfSources:
    """Passages and metadata as they are filled in behind a response, whatever is assigned."""

    _sources: Sources

    @property
    def source_nodes(self) -> list[NodeWithScore]:
        """The passages behind the answer, best first."""
        self._finish()
        return self._sources.nodes

    @source_nodes.setter
    def source_nodes(self, nodes: list[NodeWithScore]) -> None:
        self._sources.nodes = nodes

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata by node id, and under "qllm" how the answer came about."""
        return self._sources.metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, Any] | None) -> None:
        self._sources.metadata = {} if metadata is None else metadata

    def _finish(self) -> None:
        """Wait for the passages."""


class LookupStreamingResponse(_OfSources, StreamingResponse):  # type: ignore[misc]
    """A `StreamingResponse` whose `source_nodes` and `metadata` wait for the answer.

    Reading them before the stream was read lets the model finish; the text read ahead still comes out of `response_gen`.
    What is assigned, or written into the metadata, beforehand stays, and the answer adds its own to it.
    """

    def __init__(self, text: Generator[str, None, None], sources: Sources) -> None:
        self._stream = text
        self._ahead: deque[str] = deque()
        self._sources = sources
        sources.metadata = _LateMetadata(self._finish, sources.metadata)
        self.response_txt = None
        self.response_gen = self._texts()

    def _texts(self) -> Iterator[str]:
        while True:
            if self._ahead:
                yield self._ahead.popleft()
                continue
            try:
                text = next(self._stream)
            except StopIteration:
                return
            yield text

    def _finish(self) -> None:
        self._ahead.extend(self._stream)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(response_txt={self.response_txt!r})"


class LookupAsyncStreamingResponse(_OfSources, AsyncStreamingResponse):  # type: ignore[misc]
    """An `AsyncStreamingResponse` whose `source_nodes` and `metadata` fill when the stream ends, whatever is assigned."""

    def __init__(self, text: Any, sources: Sources) -> None:
        self._sources = sources
        super().__init__(response_gen=text, source_nodes=sources.nodes, metadata=sources.metadata)


class _LateMetadata(dict[str, Any]):
    """A dict that is complete when the answer is: reading it waits for that, writing to it does not."""

    def __init__(self, finish: Callable[[], None], known: dict[str, Any]) -> None:
        super().__init__({**known, _PENDING: None})
        self.finish = finish

    def __bool__(self) -> bool:
        return True  # without waiting: LlamaIndex writes `metadata or {}` to have something to write into

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self.items()),)


def _waiting(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @functools.wraps(method)
    def wait(self: _LateMetadata, *args: Any) -> Any:
        self.finish()
        dict.pop(self, _PENDING, None)
        return method(self, *args)

    return wait


for _name in ("getitem", "iter", "reversed", "len", "contains", "eq", "ne", "or", "ror", "repr", "delitem"):
    setattr(_LateMetadata, f"__{_name}__", _waiting(f"__{_name}__"))
for _name in ("get", "keys", "values", "items", "copy", "pop", "popitem"):
    setattr(_LateMetadata, _name, _waiting(_name))
