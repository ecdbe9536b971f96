"""Instrumentation events of what LlamaIndex has no event for: reading documents and looking passages up."""

from __future__ import annotations

from llama_index.core.instrumentation.events.base import BaseEvent


class ReadingProgressEvent(BaseEvent):  # type: ignore[misc]
    """Documents are being read; emitted after every chunk.

    Attributes:
        documents: How many are read.
        tokens_read: Tokens of the prompt read so far.
        tokens_total: Tokens in all; where several documents are read into a memory one after the other, an estimate from
            their lengths until the last one.

    Examples:
        ```python
        from llama_index.core.instrumentation import get_dispatcher
        from llama_index.core.instrumentation.event_handlers import BaseEventHandler
        from qllm_integrations.llama_index import QLLM, ReadingProgressEvent

        class Progress(BaseEventHandler):
            def handle(self, event, **kwargs):
                if isinstance(event, ReadingProgressEvent):
                    print(f"{event.tokens_read} of {event.tokens_total} tokens")

        get_dispatcher().add_event_handler(Progress())
        memory = QLLM(model="reader").read("The lamp was lit at dusk. " * 100)
        ```
    """

    documents: int
    tokens_read: int
    tokens_total: int

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "ReadingProgressEvent"


class DocumentsReadEvent(BaseEvent):  # type: ignore[misc]
    """Documents were read into a memory that outlives the request.

    Attributes:
        documents: How many it holds.
        tokens: How many it holds, those of a memory that was continued included.
        seconds: How long it took.
    """

    documents: int
    tokens: int
    seconds: float

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "DocumentsReadEvent"


class LookupEvent(BaseEvent):  # type: ignore[misc]
    """An answer was written with passages looked up in documents. Carries offsets, never the documents' text.

    Attributes:
        query: The text that guided the lookup.
        query_source: Which rule found it.
        mode: How the documents were read.
        reread: Whether passages behind a draft were read again before the answer.
        passages: (document, start, end, share of the attention) of each passage, best first.
    """

    query: str
    query_source: str
    mode: str
    reread: bool
    passages: list[tuple[int, int, int, float]]

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "LookupEvent"
