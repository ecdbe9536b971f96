"""One request from turns to answer: layout, reading, writing, sources."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from qllm_runtime.cache import MemoryCache
from qllm_runtime.config import MemoryConfig
from qllm_runtime.decoding import Sampler, TextStream
from qllm_runtime.errors import CancelledError, InvalidRequestError
from qllm_runtime.inference import Inference
from qllm_runtime.prompt import Prompt
from qllm_runtime.reasoning import AfterThought, AnswerStream, marks_of, opening
from qllm_runtime.request import Request, build_request_prompt, check_questions
from qllm_runtime.sources import passages, trace_back
from qllm_runtime.types import (
    Answer,
    Cancelled,
    FinishReason,
    Piece,
    Progress,
    Sampling,
    Timings,
    TokenLogprob,
    Usage,
)

#: Tokens of an answer that memories are sized for ahead; beyond that they grow.
ROOM = 4096
#: Largest share of max_tokens that a thought may use; then it is closed, so that there is an answer.
THOUGHT_SHARE = 0.75


def check_prefix(before: Prompt, prompt: Prompt) -> int:
    """Number of tokens of `prompt` that were read already: those of `before`.

    Raises:
        InvalidRequestError: The prompt does not begin with them.
    """
    if not prompt.begins_with(before):
        raise InvalidRequestError(
            "The conversation does not begin with the documents as they were read; ask with a memory's own documents first "
            "in the first user turn, without other turns ahead of them."
        )
    return len(before.ids)


def read_tokens(
    inference: Inference,
    cache: MemoryCache,
    prompt: Prompt,
    span: tuple[int, int],
    config: MemoryConfig,
    progress: Progress | None,
    cancelled: Cancelled,
) -> None:
    """Read tokens [start, end) of a prompt, `span`, into a single-row cache that holds those before them.

    What is read does not depend on whether its documents are read together or one after the other, except in faithful mode:
    the published code knows no documents.
    """
    start, end = span
    count = start

    def advance(n: int) -> None:
        nonlocal count
        count += n
        if progress is not None:
            progress(count, len(prompt.ids))

    if start < end:
        ends = [] if config.faithful else [document.end for document in prompt.document_spans]
        borders = [place - start for place in ends if start < place < end]
        ids = torch.from_numpy(prompt.ids[start:end])
        inference.read(cache, [ids], config, borders=borders, progress=advance, cancelled=cancelled)


def resume_reading(
    inference: Inference,
    config: MemoryConfig,
    prompt: Prompt,
    reading: tuple[Prompt, MemoryCache] | None,
    room: int = 0,
) -> tuple[MemoryCache, int]:
    """Memories to read `prompt` into, with room for `room` tokens after it, and how many of its tokens `reading` holds."""
    if reading is None:
        return inference.cache(config, reserve=len(prompt.ids) + room), 0
    before, cache = reading
    known = check_prefix(before, prompt)
    return cache.fork(), known


def begin_reading(request: Request, prompt: Prompt, end: int) -> tuple[MemoryCache, int]:
    """Memories for a prompt whose tokens up to `end` are going to be read, and how many of them were read already.

    The last token always has to be read: what follows it is known only then, and a memory cannot be rewound by one token.
    """
    room = min(request.sampling.max_tokens, ROOM)
    cache, known = resume_reading(request.inference, request.config, prompt, request.reading, room)
    if known == len(prompt.ids):
        cache, known = resume_reading(request.inference, request.config, prompt, None, room)
    announce_questions(cache, 0, [span for span in prompt.query_spans if known <= span[0] < end], request.config)
    if request.on_lookup is not None:
        for layer, layer_memory in zip(request.inference.facts.layers, cache.memories(), strict=True):
            layer_memory.on_lookup = partial(request.on_lookup, layer)
    return cache, known


def read_ahead(request: Request, prompt: Prompt, cancelled: Cancelled) -> tuple[Prompt, MemoryCache]:
    """Read a prompt up to the end of its last document: what every question about these documents begins with."""
    inference = request.inference
    with inference.request(cancelled):
        cache, known = begin_reading(request, prompt, prompt.read_end)
        read_tokens(inference, cache, prompt, (known, prompt.read_end), request.config, request.progress, cancelled)
    return prompt.head, cache


def answer_request(request: Request, cancelled: Cancelled, prompt: Prompt | None = None) -> Iterator[Piece]:
    """Answer a resolved request piece by piece; the last piece carries the whole answer.

    Args:
        request: The request.
        cancelled: Polled before every chunk and after every token.
        prompt: Its layout, when that is known already.
    """
    began = time.perf_counter()
    inference, config = request.inference, request.config
    prompt = prompt or build_request_prompt(request)
    tokenized = time.perf_counter()
    n = len(prompt.ids)
    with inference.request(cancelled):
        cache, known = begin_reading(request, prompt, n)
        # the published code knows one prompt; elsewhere the question starts pieces of its own
        border = known if config.faithful else max(known, min(prompt.read_end, n - 1))
        for span in ((known, border), (border, n - 1)):
            read_tokens(inference, cache, prompt, span, config, request.progress, cancelled)
        mass = _record(cache, inference, n)
        logits = inference.step(cache, [int(prompt.ids[-1])])
        if request.progress is not None:
            request.progress(n, n)
        read = time.perf_counter()
        written: list[_Written] = []
        for piece in _write(request, prompt, cache, logits, cancelled):
            written.append(piece)
            if piece.text or piece.reasoning or piece.logprobs:
                yield Piece(piece.text, logprobs=piece.logprobs, reasoning=piece.reasoning)
        weights = mass.cpu().numpy()
        if request.on_answer is not None:
            request.on_answer(prompt, cache)
    ended = time.perf_counter()
    n_written = len(request.sampler.ids)
    documents = request.documents
    assert request.mode is not None
    answer = Answer(
        text="".join(piece.text for piece in written),
        sources=passages(*trace_back(weights, prompt, request.excerpts), documents) if documents else (),
        usage=Usage(n, n_written, cache_read_tokens=known, reasoning_tokens=sum(piece.thought for piece in written)),
        timings=Timings(
            tokenize_s=tokenized - began,
            read_s=read - tokenized,
            decode_s=ended - read,
            total_s=time.perf_counter() - began,
            read_tokens_per_s=(n - known) / max(read - tokenized, 1e-9),
            decode_tokens_per_s=n_written / max(ended - read, 1e-9) if n_written else 0.0,
            peak_memory_bytes=_peak_memory(inference),
        ),
        finish_reason=next((piece.finish for piece in reversed(written) if piece.finish), "length"),
        query=request.query or "",
        query_source=request.query_source,
        mode=request.mode,
        reread=bool(request.excerpts),
        reasoning="".join(piece.reasoning for piece in written),
        token_ids=tuple(request.sampler.ids),
        logprobs=tuple(entry for piece in written for entry in piece.logprobs)
        if request.sampling.logprobs is not None
        else None,
    )
    yield Piece("", answer)


def announce_questions(cache: MemoryCache, row: int, spans: Sequence[tuple[int, int]], config: MemoryConfig) -> None:
    """Tell every layer of a row where its questions will stand; the published code knows only the first."""
    for memory in cache.memories(row):
        for span in spans[:1] if config.faithful else spans:
            memory.set_query(*span)


def _record(cache: MemoryCache, inference: Inference, length: int) -> torch.Tensor:
    """[length + 1] attention mass per token of the prompt, then of all that follow, filled while single tokens are fed."""
    mass = torch.zeros(length + 1, device=inference.device)

    def add(weights: torch.Tensor, positions: torch.Tensor) -> None:
        places = positions.reshape(-1).to(mass.device).clamp(max=length)
        mass.index_add_(0, places, weights.reshape(-1).to(mass))

    for memory, facts in zip(cache.memories(), inference.facts.layers.values(), strict=True):
        if facts.sliding_window is None:
            memory.on_weights = add
    return mass


@dataclass(frozen=True)
class _Written:
    """What one token adds, or what is left at the end; `thought`: the token belongs to a thought."""

    text: str
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    thought: bool = False


def _write(
    request: Request, prompt: Prompt, cache: MemoryCache, logits: torch.Tensor, cancelled: Cancelled
) -> Iterator[_Written]:
    sampler = request.sampler
    marks = marks_of(request.tokenizer)
    opened = opening(prompt.ids[len(prompt.ids) - prompt.closing :].tolist(), marks) if marks is not None else None
    for processor in sampler.processors:
        if isinstance(processor, AfterThought):
            processor.prompted(opened)
    text = AnswerStream(request.tokenizer, request.sampling.stop, marks, bool(opened))
    ends = end_tokens(request.inference.model, request.tokenizer)

    def left(finish: FinishReason) -> _Written:
        reasoning, rest = text.finish()
        return _Written(rest, reasoning, finish="stop" if text.stopped else finish)

    longest = min(request.sampling.max_tokens * THOUGHT_SHARE, request.sampling.max_tokens - 1)
    while True:
        token = sampler.choose(logits[0])
        if marks is not None and text.thinking and (token in ends or len(sampler.ids) >= longest):
            token = sampler.ids[-1] = marks.end
        if token in ends:
            sampler.ids.pop()
            yield left("stop")
            return
        logprob = sampler.logprob(request.tokenizer)
        before = text.thinking
        reasoning, said = text.push(token)
        thought = before or text.thinking
        logprobs = () if logprob is None or thought else (logprob,)
        yield _Written(said, reasoning, logprobs, "stop" if text.stopped else None, thought)
        if text.stopped:
            return
        if len(sampler.ids) >= request.sampling.max_tokens:
            yield left("length")
            return
        if cancelled():
            raise CancelledError("Cancelled while writing.")
        logits = request.inference.step(cache, [token])


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, from the model's configurations and the tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def _peak_memory(inference: Inference) -> int:
    device = inference.device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def generate(
    inference: Inference,
    tokenizer: Any,
    rows: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int] | None],
    config: MemoryConfig,
    sampling: Sampling,
    progress: Progress | None,
    cancelled: Cancelled,
) -> list[list[int]]:
    """Continue rows of token ids, which share forward passes only. `tokenizer`: for stop strings and end tokens, or None."""
    check_questions((span for span in spans if span is not None), config)
    samplers = [Sampler(sampling) for _ in rows]
    texts = [TextStream(tokenizer, sampling.stop) if sampling.stop else None for _ in rows]
    ends = end_tokens(inference.model, tokenizer)
    total = sum(len(row) for row in rows)
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    with inference.request(cancelled):
        room = min(sampling.max_tokens, ROOM)
        cache = inference.cache(config, rows=len(rows), reserve=max(len(row) for row in rows) + room)
        for number, span in enumerate(spans):
            announce_questions(cache, number, [] if span is None else [span], config)
        if any(len(row) > 1 for row in rows):
            inference.read(cache, [row[:-1] for row in rows], config, progress=advance, cancelled=cancelled)
        tokens: list[int | None] = [int(row[-1]) for row in rows]
        while any(token is not None for token in tokens):
            if cancelled():
                raise CancelledError("Cancelled while writing.")
            logits = inference.step(cache, tokens)
            if done < total:
                advance(total - done)
            for number, (sampler, text) in enumerate(zip(samplers, texts, strict=True)):
                if tokens[number] is None:
                    continue
                token = sampler.choose(logits[number])
                tokens[number] = None
                if token in ends:
                    sampler.ids.pop()
                    continue
                if text is not None:
                    text.push(token)
                    if text.stopped:
                        sampler.ids = text.kept()
                        continue
                if len(sampler.ids) < sampling.max_tokens:
                    tokens[number] = token
    return [sampler.ids for sampler in samplers]
