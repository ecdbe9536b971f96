"""Looking the answer up in the whole text, then reading what was found again, next to the question, and answering.

A looked-up block is seen at one far distance, next to blocks it never stood beside. Read again in the window, with the question
after it, the same passage is understood as well as a short text is (measured: docs/results.md). The first answer is a draft:
it is not shown, its attention says what to read again, and so do the question's own lookups (`finding`).

Where the passages leave at least half of the window free, everything else stays within reach of the lookups. In a smaller
window they would evict one another and would have to be looked up again among similar text, so there they are read alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from qllm_runtime import answering, finding
from qllm_runtime.cache import MemoryCache
from qllm_runtime.decoding import Sampler
from qllm_runtime.prompt import Prompt
from qllm_runtime.request import Request, build_request_prompt, resolve
from qllm_runtime.sources import in_order
from qllm_runtime.types import Answer, Cancelled, Document, Piece, Sampling, Source

#: Tokens of the draft; an answer begins with what it is about.
DRAFT_TOKENS = 48
#: Blocks the question names, in documents of at least this many tokens, and passages of the draft that are read beside them.
NAMED_BLOCKS = 3
WORTH_FINDING = 8192
BESIDE_NAMED = 3


def serve_request(request: Request, cancelled: Cancelled) -> Iterator[Piece]:
    """Answer a request, piece by piece; the last piece carries the whole answer."""
    began = time.perf_counter()
    request = resolve(request)
    config = request.config
    prompt = build_request_prompt(request, cancelled)
    tokenized = time.perf_counter()
    looks_up = config.uses_blocks and not config.faithful and len(prompt.ids) > config.n_init + config.n_local
    work = _reread if request.reread and looks_up and request.documents else answering.answer_request
    for piece in _in_turn(request, cancelled, work(request, cancelled, prompt)):
        if piece.answer is not None:
            spent = piece.answer.timings.tokenize_s + tokenized - began
            timings = replace(piece.answer.timings, tokenize_s=spent, total_s=time.perf_counter() - began)
            piece = replace(piece, answer=replace(piece.answer, timings=timings))
        yield piece


def _in_turn(request: Request, cancelled: Cancelled, pieces: Iterator[Piece]) -> Iterator[Piece]:
    with request.inference.turn(cancelled):
        yield from pieces


def _reread(request: Request, cancelled: Cancelled, prompt: Prompt) -> Iterator[Piece]:
    began = time.perf_counter()
    config = request.config
    fresh = request.reading is None
    worth_finding = prompt.read_end >= WORTH_FINDING
    story = finding.measures(request, cancelled) if worth_finding else None
    report, n = request.progress, len(prompt.ids) + (story.n_tokens if story else 0)

    def tell(done: int) -> None:
        if report is not None:
            report(done, n)

    def read_all(done: int, total: int) -> None:
        # the last token is not reported read before the answer can begin
        if done == total:
            tell(n)

    if fresh:
        counted = replace(request, progress=lambda done, _: tell(done))
        request = replace(request, reading=answering.read_ahead(counted, prompt, cancelled))
    read = time.perf_counter()
    layer = None
    if worth_finding:
        layer = finding.retrieval_layer(request, story, lambda done: tell(prompt.read_end + done), cancelled)
    named: list[Source] = []

    def look(layer: int, prompt: Prompt, cache: MemoryCache) -> None:
        named.extend(finding.named_by_question(layer, NAMED_BLOCKS, prompt, cache, config, request.documents))

    on_answer = None if layer is None else partial(look, layer)
    short = Sampling(max_tokens=DRAFT_TOKENS)  # whatever the answer's limit is: that only cuts the answer
    draft_request = replace(request, sampling=short, sampler=Sampler(short), progress=None, on_answer=on_answer)
    *_, last = answering.answer_request(draft_request, cancelled, prompt)
    draft = last.answer
    assert draft is not None
    attended = draft.sources[:BESIDE_NAMED] if named else draft.sources
    found = in_order([*attended, *named], request.documents)
    drafted = time.perf_counter()
    last_request, last_prompt, alone = replace(request, excerpts=found, progress=read_all), None, False
    if found and _can_be_alone(request):
        by_themselves = _alone(last_request)
        passages = build_request_prompt(by_themselves, cancelled)
        alone = 2 * sum(span.end - span.start for span in passages.document_spans) > config.n_local
        if alone:
            last_request, last_prompt = by_themselves, passages
    for piece in answering.answer_request(last_request, cancelled, last_prompt):
        if piece.answer is not None:
            final = _moved_back(piece.answer, found) if alone else piece.answer
            first = read - began if fresh else draft.timings.read_s
            speed = prompt.read_end / max(first, 1e-9) if fresh else draft.timings.read_tokens_per_s
            again = drafted - began - first + final.timings.read_s
            timings = replace(final.timings, read_s=first, reread_s=again, read_tokens_per_s=speed)
            cached = 0 if fresh else draft.usage.cache_read_tokens
            usage = replace(final.usage, prompt_tokens=n, cache_read_tokens=cached)
            piece = replace(piece, answer=replace(final, timings=timings, usage=usage))
        yield piece


def _can_be_alone(request: Request) -> bool:
    """Whether the conversation is one without its documents: they stand in user turns that say something as well."""
    return all(turn.role == "user" and turn.text for turn in request.turns if turn.documents)


def _alone(request: Request) -> Request:
    """The request with its passages in place of all documents; lookups are reported of documents only."""
    turns = [replace(turn, content=tuple(x for x in turn.content if isinstance(x, str))) for turn in request.turns]
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    passages = tuple(Document(source.text, source.title) for source in request.excerpts)
    turns[last] = replace(turns[last], content=(*passages, *turns[last].content))
    return replace(request, turns=tuple(turns), memory=None, reading=None, excerpts=(), on_lookup=None)


def _moved_back(answer: Answer, found: Sequence[Source]) -> Answer:
    """The answer with its sources where they stand in the documents that the passages come from."""
    sources = []
    for source in answer.sources:
        home = found[source.document]
        start, end = home.start + source.start, home.start + source.end
        sources.append(replace(source, document=home.document, start=start, end=end))
    return replace(answer, sources=tuple(sources), reread=True)
