"""Instrumentation events of what LlamaIndex has no event for: reading documents and looking passages up."""

from __future__ import annotations

from llama_index.core.instrumentation.events.base import BaseEvent


class DocumentsReadEvent(BaseEvent):  # type: ignore[misc]
    """Documents were read into a memory that outlives the request.

    Attributes:
        documents: How many.
        tokens: Tokens read.
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
        passages: (document, start, end, share of the attention) of each passage, best first.
    """

    query: str
    query_source: str
    mode: str
    passages: list[tuple[int, int, int, float]]

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "LookupEvent"
