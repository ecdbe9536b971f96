"""A conversation as token ids, with the places of documents and question known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qllm_runtime.chat_template import abilities, render, template_of
from qllm_runtime.layout import Message, Segment, insert, lay_out
from qllm_runtime.tokenization import SegmentTokenizer, concatenate
from qllm_runtime.tool_text import describe_tools
from qllm_runtime.toolcalls import call_format
from qllm_runtime.types import Cancelled, Document, Mode, Turn, never

__all__ = ["DocumentSpan", "Prompt", "Segment", "build_prompt", "build_reading", "renders_tools"]


@dataclass(frozen=True)
class DocumentSpan:
    """Where a document stands in the prompt.

    Attributes:
        document: Index of the document in order of appearance.
        start, end: Its tokens.
        offsets: [end - start, 2] character offsets of each token into `Document.text`.
    """

    document: int
    start: int
    end: int
    offsets: NDArray[np.int64]

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens of the prompt that hold some of the characters [start, end) of the document."""
        inside = np.flatnonzero((self.offsets[:, 0] < end) & (self.offsets[:, 1] > start))
        return [int(n) + self.start for n in inside]


@dataclass(frozen=True)
class Prompt:
    """Token ids and what they are.

    Attributes:
        ids: [n] token ids with at most one beginning-of-sequence token.
        query_spans: Token spans of the question, in order of appearance.
        document_spans: One span per document.
        read_end: Tokens [0, read_end) hold everything up to and including the last document (0 without documents).
        closing: Number of tokens that the chat template wrote after the last content.
    """

    ids: NDArray[np.int64]
    query_spans: tuple[tuple[int, int], ...]
    document_spans: tuple[DocumentSpan, ...]
    read_end: int
    closing: int = 0

    @property
    def head(self) -> Prompt:
        """Everything up to and including the last document."""
        ahead = tuple(span for span in self.query_spans if span[1] <= self.read_end)
        return Prompt(self.ids[: self.read_end], ahead, self.document_spans, self.read_end)

    def begins_with(self, read: Prompt) -> bool:
        """Whether its first tokens are those that were read."""
        return np.array_equal(self.ids[: len(read.ids)], read.ids)

    def on_top_of(self, read: Prompt) -> Prompt:
        """This prompt with its beginning, up to the documents that were read, as it was read."""
        end = self.document_spans[len(read.document_spans) - 1].end
        shift = len(read.ids) - end
        later = self.document_spans[len(read.document_spans) :]
        return replace(
            self,
            ids=np.concatenate([read.ids, self.ids[end:]]),
            query_spans=tuple((a + shift, b + shift) for a, b in self.query_spans if a >= end),
            document_spans=(
                *read.document_spans,
                *(replace(span, start=span.start + shift, end=span.end + shift) for span in later),
            ),
            read_end=self.read_end + shift,
        )


def build_prompt(
    tokenizer: Any,
    turns: Sequence[Turn],
    *,
    query: str | None,
    mode: Mode,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    tools_as_text: bool = False,
    read: Prompt | None = None,
    cancelled: Cancelled = never,
) -> Prompt:
    """Lay out and tokenise a conversation.

    The model's own chat template writes everything around the contents. A tokenizer without one gets a plain layout:
    the beginning-of-sequence token if there is one, then for each turn a line `System:`, `User:`, `Assistant:` or
    `Tool:`, its content and an empty line, and a last line `Assistant:`. A beginning-of-sequence token is added when
    the tokenizer adds one of its own accord and the template has not written it.

    A user turn with documents reads QUESTION, documents, text in mode "query_aware" and documents, text in mode
    "read_once", an empty line between them; a document with a title is preceded by a line `[title]`. What a template
    cannot express is rewritten without losing text: a system turn goes ahead of the first user turn, turns of one role
    in a row are merged, tools are described in the system turn (after the documents in mode "read_once", so that the
    reading stays the same), calls and results become text.

    Args:
        tokenizer: A fast tokenizer of transformers.
        turns: The conversation; documents stand in user or tool turns.
        query: The question to route to the lookup ("" or None: none). It is marked where a user turn asks it.
        mode: "query_aware" puts it ahead of the documents as well.
        tools: Tools in the format of OpenAI functions.
        template_kwargs: Further variables for the chat template.
        add_generation_prompt: End with the opening of an assistant turn.
        tools_as_text: Describe the tools as text even if the template writes them itself.
        read: What `build_reading` made of the first documents, which are then not tokenised again.
        cancelled: Polled while texts are tokenised.

    Raises:
        CancelledError: `cancelled` returned True.
        InvalidRequestError: The conversation is empty or the chat template refuses it.
        DocumentError: A document is empty.
        UnsupportedModelError: Not a fast tokenizer.
    """
    messages = lay_out(turns, query, mode)
    segmenter, segments = _segments(
        tokenizer, messages, mode, tools, template_kwargs, add_generation_prompt, tools_as_text
    )
    return _tokenise(tokenizer, segmenter, segments, read, cancelled)


def build_reading(
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    system: str | None,
    template_kwargs: Mapping[str, Any] | None = None,
    read: Prompt | None = None,
    cancelled: Cancelled = never,
) -> Prompt:
    """The beginning of every "read_once" prompt with these documents and this system text: up to the documents' end.

    What `read` has made of the first of them is not tokenised again.
    """
    turns = [Turn("system", (system,))] if system else []
    messages = lay_out([*turns, Turn("user", tuple(documents))], None, "read_once")
    segmenter, segments = _segments(tokenizer, messages, "read_once", None, template_kwargs, False)
    last = max(i for i, segment in enumerate(segments) if segment.kind == "document")
    return _tokenise(tokenizer, segmenter, segments[: last + 1], read, cancelled)


def renders_tools(tokenizer: Any) -> bool:
    """Whether the chat template writes tools itself.

    Otherwise the prompt describes them as text and asks for calls in the model's own format (`toolcalls.call_format`).
    """
    return abilities(tokenizer, template_of(tokenizer, [{}])).tools


def _segments(
    tokenizer: Any,
    messages: list[Message],
    mode: Mode,
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None,
    add_generation_prompt: bool,
    tools_as_text: bool = False,
) -> tuple[SegmentTokenizer, Sequence[Segment]]:
    template = template_of(tokenizer, None if tools_as_text else tools)
    segmenter = SegmentTokenizer.of(tokenizer, template)
    able = abilities(tokenizer, template)
    if tools and (tools_as_text or not able.tools):
        messages = _with_tools_as_text(messages, describe_tools(tools, call_format(template)), mode)
        tools = None
    segments = render(
        tokenizer,
        template,
        able,
        messages,
        control=segmenter.control,
        tools=tools,
        template_kwargs=template_kwargs,
        add_generation_prompt=add_generation_prompt,
    )
    return segmenter, segments


def _with_tools_as_text(messages: list[Message], description: str, mode: Mode) -> list[Message]:
    holds = [i for i, m in enumerate(messages) if any(segment.kind == "document" for segment in m.segments)]
    changed = list(messages)
    if mode == "read_once" and holds:
        changed[holds[-1]] = insert(messages[holds[-1]], description, after_documents=True)
    elif messages[0].role == "system":
        changed[0] = insert(messages[0], description)
    else:
        changed.insert(0, Message("system", (Segment("text", description),)))
    return changed


def _tokenise(
    tokenizer: Any,
    segmenter: SegmentTokenizer,
    segments: Sequence[Segment],
    known: Prompt | None,
    cancelled: Cancelled,
) -> Prompt:
    parts: list[NDArray[np.int64]] = []
    queries: list[tuple[int, int]] = []
    spans: list[DocumentSpan] = []
    position = closing = 0
    space = segmenter.prefixes  # a space ahead of the next text is part of its first word
    for index, segment in enumerate(segments):
        offsets = np.zeros((0, 2), np.int64)
        if segment.kind == "template":
            following = segments[index + 1].kind if index + 1 < len(segments) else "template"
            space = segmenter.prefixes and following != "template" and segment.text.endswith(" ")
            text = segment.text[:-1] if space else segment.text
            ids = np.array(segmenter.template(text, first=index == 0), dtype=np.int64)
        elif known and segment.kind == "document" and int(segment.document or 0) < len(known.document_spans):
            span = known.document_spans[int(segment.document or 0)]
            ids, offsets = known.ids[span.start : span.end], span.offsets
        else:
            ids, offsets = segmenter.text(segment.text, space=space, cancelled=cancelled)
        if index == 0 and _lacks_bos(tokenizer, ids):  # a part of its own: a template may begin with a content
            parts.append(np.array([tokenizer.bos_token_id], dtype=np.int64))
            position = 1
        end = position + len(ids)
        if segment.kind == "query":
            queries.append((position, end))
        elif segment.kind == "document":
            spans.append(DocumentSpan(int(segment.document or 0), position, end, offsets))
        parts.append(ids)
        position = end
        space = space and segment.kind == "template"
        closing = len(ids) if segment.kind == "template" else 0
    return Prompt(concatenate(parts), tuple(queries), tuple(spans), spans[-1].end if spans else 0, closing)


def _lacks_bos(tokenizer: Any, ids: NDArray[np.int64]) -> bool:
    """Whether a prompt that begins with `ids` needs a beginning-of-sequence token ahead of them."""
    bos = tokenizer.bos_token_id
    if bos is None or (len(ids) and ids[0] == bos):
        return False
    return not tokenizer.chat_template or tokenizer("a")["input_ids"][:1] == [bos]
