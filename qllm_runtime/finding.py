"""Passages that the question's own lookups name.

Few layers of a model find facts, and scores do not tell which (benchmarks/LOG.md). So a model is asked about a short story
made on the spot, once: the layer whose lookups for these questions rank the right blocks first is listened to from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from qllm_runtime import answering
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import ContextOverflowError
from qllm_runtime.inference import Inference
from qllm_runtime.prompt import Prompt
from qllm_runtime.request import Request, lay_out
from qllm_runtime.samples import sample_document
from qllm_runtime.seam import MemoryCache
from qllm_runtime.sources import surroundings
from qllm_runtime.types import Cancelled, Document, Sampling, Source, Turn

STORY_CHARS = 6_000
STORY_FACTS = 12
STORY_WINDOW = 256  # tokens at most; the rest of the story is looked up
#: A layer finds when the mean over questions of 1 / rank of the right block is at least this.
LEAST = 0.3

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
        n_blocks: Blocks, at most; blocks outside the documents give no passage.
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


def layer_that_finds(request: Request, cancelled: Cancelled) -> int | None:
    """The layer whose lookups for the request's question find facts, or None; a model is asked only once."""
    given = request.config
    if not request.query or given.policy != "qllm" or not given.query_weight:
        return None
    window = min(given.n_local, STORY_WINDOW)
    config = given.replace(n_local=window, exec_block_size=min(given.exec_block_size, window))
    known = _known.setdefault(request.inference, {})
    if config not in known:
        try:
            ranks = _reciprocal_ranks(replace(request, config=config), cancelled)
        except ContextOverflowError:  # in so small a window the story's questions have no place
            known[config] = None
        else:
            best = int(ranks.argmax())
            known[config] = best if ranks[best] >= LEAST else None
    return known[config]


def _reciprocal_ranks(request: Request, cancelled: Cancelled) -> NDArray[np.float64]:
    """[layers] mean over questions of 1 / rank of the block in which a fact of the story stands."""
    story, facts = sample_document(n_facts=STORY_FACTS, min_chars=STORY_CHARS)
    request = replace(
        request,
        mode="read_once",
        tools=None,
        sampling=Sampling(max_tokens=1),
        progress=None,
        on_lookup=None,
        reading=None,
    )
    asked = []
    for question, statement in facts:
        at = story.find(statement)
        if at < 0:  # asked for in other words than it is stated in
            continue
        turns = (Turn("user", (Document(story), question)),)
        request = replace(request, turns=turns, query=question)
        prompt = lay_out(request)
        if request.reading is None:
            request = replace(request, reading=answering.read_ahead(request, prompt, cancelled))
        asked.append(_reciprocal_ranks_of(request, prompt, (at, at + len(statement)), cancelled))
    means: NDArray[np.float64] = np.mean(asked, axis=0)
    return means


def _reciprocal_ranks_of(
    request: Request, prompt: Prompt, place: tuple[int, int], cancelled: Cancelled
) -> NDArray[np.float64]:
    """[layers] 1 / rank of the best block that holds some of the characters `place`; 0 where none left the window."""
    config, tokens = request.config, prompt.document_spans[0].tokens(*place)
    right = sorted({(token - config.n_init) // config.block_size for token in tokens if token >= config.n_init})
    found = []
    with request.inference.request(cancelled):
        cache, known = answering.begin(request, prompt, len(prompt.ids))
        rows = [torch.from_numpy(prompt.ids[known:])]
        request.inference.read(cache, rows, config, cancelled=cancelled)
        for memory in cache.memories():
            scores = memory.question_scores()
            held = [] if scores is None else [block for block in right if block < len(scores)]
            found.append(1 / (1 + int((scores > scores[held].max()).sum())) if scores is not None and held else 0.0)
    return np.array(found)
