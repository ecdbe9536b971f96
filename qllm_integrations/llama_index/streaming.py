"""Streaming responses whose sources are known when the answer is."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.schema import NodeWithScore

from qllm_integrations.llama_index.asking import Sources


class LookupStreamingResponse(StreamingResponse):  # type: ignore[misc]
    """A `StreamingResponse` whose `source_nodes` and `metadata` wait for the answer.

    Asking for them before the stream was read lets the model finish; the text read ahead still comes out of
    `response_gen`.
    """

    def __init__(self, text: Generator[str, None, None], sources: Sources) -> None:
        self._stream = text
        self._ahead: deque[str] = deque()
        self._sources = sources
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

    def _finish(self) -> Sources:
        self._ahead.extend(self._stream)
        return self._sources

    @property
    def source_nodes(self) -> list[NodeWithScore]:
        """The passages behind the answer, best first."""
        return self._finish().nodes

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata by node id, and under "qllm" how the answer came about."""
        return self._finish().metadata

    def __repr__(self) -> str:
        return f"{type(self).__name__}(response_txt={self.response_txt!r})"


def async_streaming_response(text: Any, sources: Sources) -> AsyncStreamingResponse:
    """An `AsyncStreamingResponse` whose `source_nodes` and `metadata` fill when the stream ends."""
    return AsyncStreamingResponse(response_gen=text, source_nodes=sources.nodes, metadata=sources.metadata)
