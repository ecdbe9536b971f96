"""Mode "reread": look the answer up in the whole text, then read what was found again, close together, and answer.

A looked-up block is seen at one far distance, next to blocks it never stood beside. Read again in the window, with the question
behind it, the same passage is understood as well as a short text is (measured: docs/results.md). The first answer is a draft:
it is not shown, its attention says where to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qllm_runtime import answering
from qllm_runtime.answering import Request
from qllm_runtime.decoding import Sampler
from qllm_runtime.inference import Cancelled
from qllm_runtime.types import Answer, Document, Piece, Sampling, Source, Turn, Usage

#: Tokens of the draft; an answer begins with what it is about.
DRAFT_TOKENS = 48


def serve(request: Request, cancelled: Cancelled) -> Iterator[Piece]:
    """Answer a request in its mode, piece by piece; the last piece carries the whole answer."""
    return (_reread if request.mode == "reread" else answering.run)(request, cancelled)


def _reread(request: Request, cancelled: Cancelled) -> Iterator[Piece]:
    turns = answering.with_memory(request.turns, request.memory)
    documents = tuple(document for turn in turns for document in turn.documents)
    plain = Sampling(max_tokens=min(DRAFT_TOKENS, request.sampling.max_tokens))
    *_, last = answering.run(
        replace(
            request, mode=None if request.memory else "read_once", sampling=plain, sampler=Sampler(plain), tools=None
        ),
        cancelled,
    )
    draft = last.answer
    assert draft is not None
    found = sorted(draft.sources, key=lambda source: (source.document, source.start))
    if found:
        request = replace(request, turns=_with_passages(turns, found, documents), memory=None, progress=None)
    again = replace(request, mode=None if request.memory else "read_once", on_lookup=None)
    for piece in answering.run(again, cancelled):
        if piece.answer is None:
            yield piece
        else:
            yield replace(piece, answer=_joined(draft, piece.answer, found, documents))


def _with_passages(turns: tuple[Turn, ...], found: list[Source], documents: tuple[Document, ...]) -> tuple[Turn, ...]:
    """The conversation with every document replaced by its passages, in their order."""
    first = 0
    changed = []
    for turn in turns:
        content: list[str | Document] = []
        for part in turn.content:
            if isinstance(part, str):
                content.append(part)
                continue
            content += [Document(source.text, documents[first].title) for source in found if source.document == first]
            first += 1
        changed.append(replace(turn, content=tuple(content)))
    return tuple(changed)


def _joined(draft: Answer, answer: Answer, found: list[Source], documents: tuple[Document, ...]) -> Answer:
    """The second answer, with places in the original documents and the counts and times of both readings."""
    sources = answer.sources
    if found:
        sources = tuple(_in_original(source, found[source.document], documents) for source in answer.sources)
    a, b = draft.timings, answer.timings
    timings = replace(
        b,
        tokenize_s=a.tokenize_s + b.tokenize_s,
        read_s=a.read_s + a.decode_s + b.read_s,
        total_s=a.total_s + b.total_s,
        read_tokens_per_s=a.read_tokens_per_s,
    )
    again = answer.usage.prompt_tokens if found else 0
    usage = Usage(draft.usage.prompt_tokens + again, answer.usage.completion_tokens, draft.usage.cache_read_tokens)
    return replace(answer, sources=sources, timings=timings, usage=usage, mode="reread")


def _in_original(source: Source, passage: Source, documents: tuple[Document, ...]) -> Source:
    start, end = passage.start + source.start, passage.start + source.end
    text = documents[passage.document].text[start:end]
    return Source(passage.document, passage.title, start, end, source.score, text)
