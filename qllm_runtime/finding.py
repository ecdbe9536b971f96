"""Passages that the question's own lookups name.

Only a few layers of a model find facts, and their scores do not tell which (benchmarks/LOG.md). So each model is measured
once: it is asked about a short story made on the spot, and the layer whose lookups rank the right blocks highest is used
from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from qllm_runtime import answering
from qllm_runtime.cache import MemoryCache
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import ContextOverflowError
from qllm_runtime.inference import Inference
from qllm_runtime.prompt import Prompt
from qllm_runtime.request import Request, build_request_prompt
from qllm_runtime.samples import sample_document
from qllm_runtime.sources import surroundings
from qllm_runtime.types import Cancelled, Document, Sampling, Source, Turn

STORY_CHARS = 6_000
STORY_FACTS = 12
STORY_WINDOW = 256  # tokens at most; the rest of the story is looked up
STORY_CHUNK = 2048
#: A layer finds facts when its mean reciprocal rank (over questions, of the right block) is at least this.
MIN_MRR = 0.3

_known: WeakKeyDictionary[Inference, dict[MemoryConfig, int | None]] = WeakKeyDictionary()


def named_by_question(
    layer: int,
    n_blocks: int,
    prompt: Prompt,
    cache: MemoryCache,
    config: MemoryConfig,
    documents: Sequence[Document],
) -> list[Source]:
    """Passages around the blocks that score highest for the question alone.

    Args:
        layer: Layer whose scores are taken.
        n_blocks: Most blocks to take; those outside the documents give no passage.
        prompt: The prompt, for the spans of its documents.
        cache: Memories that hold it.
        config: Layout of these.
        documents: The documents in order of appearance.
    """
    scores = cache.memories()[layer].question_scores()
    if scores is None:
        return []
    best: list[int] = scores.topk(min(n_blocks, len(scores))).indices.tolist()
    starts = [config.n_init + block * config.block_size for block in best]
    return [found for start in starts for found in surroundings(start, start + config.block_size, prompt, documents)]


@dataclass(frozen=True)
class Story:
    """What a model is measured with.

    Attributes:
        request: The request, with the memory's layout as it is for the story.
        questions: Prompts that ask for its facts, and the characters [start, end) that state them.
    """

    request: Request
    questions: tuple[tuple[Prompt, tuple[int, int]], ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that are read: the story once, every question."""
        first = self.questions[0][0].read_end
        return first + sum(len(prompt.ids) - prompt.read_end for prompt, _ in self.questions)


def measures(request: Request, cancelled: Cancelled) -> Story | None:
    """What has to be read before `retrieval_layer` can tell; None where it can already, or never will."""
    config = _layout(request)
    if config is None or config in _known.setdefault(request.inference, {}):
        return None
    text, facts = sample_document(n_facts=STORY_FACTS, min_chars=STORY_CHARS)
    request = replace(
        request,
        config=config,
        mode="read_once",
        tools=None,
        sampling=Sampling(max_tokens=1),
        progress=None,
        on_lookup=None,
        reading=None,
    )
    questions = []
    try:
        for question, statement in facts:
            at = text.find(statement)
            if at >= 0:  # some are asked for in other words than they are stated in
                turns = (Turn("user", (Document(text), question)),)
                prompt = build_request_prompt(replace(request, turns=turns, query=question), cancelled)
                questions.append((prompt, (at, at + len(statement))))
    except ContextOverflowError:  # in so small a window the story's questions have no place
        _known[request.inference][config] = None
        return None
    return Story(request, tuple(questions))


def retrieval_layer(
    request: Request, story: Story | None, progress: Callable[[int], None], cancelled: Cancelled
) -> int | None:
    """The layer whose lookups for the request's question find facts, or None.

    Args:
        request: The request.
        story: What `measures` gave for it.
        progress: Called with the tokens of the story that are read so far.
        cancelled: Polled before every chunk.
    """
    config = _layout(request)
    if config is None:
        return None
    known = _known.setdefault(request.inference, {})
    if story is not None:
        mrr = _mean_reciprocal_rank(story, progress, cancelled)
        best = int(mrr.argmax())
        known[config] = best if mrr[best] >= MIN_MRR else None
    return known[config]


def _layout(request: Request) -> MemoryConfig | None:
    """Layout of the memory for the story, without what cannot change scores; None where no layer is listened to."""
    given = request.config
    if not request.query or given.policy != "qllm" or not given.query_weight:
        return None
    window = min(given.n_local, STORY_WINDOW)
    return given.replace(
        n_local=window,
        exec_block_size=min(given.exec_block_size, window),
        chunk_size=STORY_CHUNK,
        device_blocks=None,
        offload_dtype="auto",
        rope_theta=None,
    )


def _mean_reciprocal_rank(story: Story, progress: Callable[[int], None], cancelled: Cancelled) -> NDArray[np.float64]:
    """[layers] mean over questions of 1 / rank of the block in which a fact of the story stands."""
    request, (first, _) = story.request, story.questions[0]
    reads = replace(request, progress=lambda done, _: progress(done))
    request = replace(request, reading=answering.read_ahead(reads, first, cancelled))
    done, asked = first.read_end, []
    for prompt, place in story.questions:
        asked.append(_reciprocal_rank(request, prompt, place, cancelled))
        done += len(prompt.ids) - prompt.read_end
        progress(done)
    means: NDArray[np.float64] = np.mean(asked, axis=0)
    return means


def _reciprocal_rank(
    request: Request, prompt: Prompt, place: tuple[int, int], cancelled: Cancelled
) -> NDArray[np.float64]:
    """[layers] 1 / rank of the best block that holds some of the characters `place`; 0 where none left the window."""
    config, tokens = request.config, prompt.document_spans[0].tokens(*place)
    right = sorted({(token - config.n_init) // config.block_size for token in tokens if token >= config.n_init})
    found = []
    with request.inference.request(cancelled):
        cache, known = answering.begin_reading(request, prompt, len(prompt.ids))
        rows = [torch.from_numpy(prompt.ids[known:])]
        request.inference.read(cache, rows, config, cancelled=cancelled)
        for memory in cache.memories():
            scores = memory.question_scores()
            held = [] if scores is None else [block for block in right if block < len(scores)]
            found.append(1 / (1 + int((scores > scores[held].max()).sum())) if scores is not None and held else 0.0)
    return np.array(found)
