"""The block memory: initial tokens, pinned question, looked-up blocks and local window under one softmax (paper eq. 2).

A query attends to

* its window: at least `n_local` preceding tokens at their true distance, from a block boundary on;
* once blocks have left the window: the initial tokens, the question's tokens (pinned) and the `topk` blocks its piece
  looked up, all at the single distance `n_local - 1`.

Every token is counted once. Pieces of `exec_block_size` queries share a lookup, but every token of the question looks up
for itself: a mean over its words finds none of them. A block is eligible for a piece when all of it lies at least `n_local`
tokens before the piece, so results do not depend on where a text is cut between pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Self, TypedDict

import torch
from typing_extensions import override

from qllm_kernels.attention import FarSegment, apply_sinks, segment_logits
from qllm_kernels.dispatch import (
    attend_pieces,
    attend_step,
    attention_mass,
    backend,
    on_device,
    rotate_append,
    step_mass,
)
from qllm_kernels.mass import Mass
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.memory.base import GraphStep, Rotation, Scoring, State
from qllm_runtime.memory.far_context import FarContext
from qllm_runtime.memory.far_keys import FarKeys
from qllm_runtime.memory.graph_step import GraphStepMemory, step_span, window_positions
from qllm_runtime.memory.pieces import Pieces
from qllm_runtime.memory.places import DevicePlace, Place
from qllm_runtime.memory.window import Window

_TOGETHER = 64  # single tokens whose far keys are gathered at a time


class Span(TypedDict):
    """Where pieces lie in the window and how their dot products become weights, as the kernels take it."""

    slot: int
    back: int
    length: int
    scale: float
    softcap: float | None


class BlockMemory(GraphStepMemory):
    """Memory of the policies qllm, infllm, streaming and lm-infinite.

    Args:
        config: Sizes and policy.
        rotation: The layer's rotary embedding.
        reserve: Tokens expected; sizes the pages.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation, reserve: int = 0) -> None:
        self.config = config
        self._far_context = FarContext(config, rotation, reserve // config.block_size)
        self._window = Window(config, rotation)
        self._n_blocks = 0  # blocks that left the window; those of streaming policies are not kept
        self._cuts = Pieces(config.exec_block_size)
        self._scoring: Scoring | None = None  # of the last tokens

    @override
    def set_query(self, start: int, end: int) -> None:
        if start < self.n_seen or end <= start:
            raise InvalidRequestError(
                f"Query span ({start}, {end}) must be a non-empty span of tokens that were not read yet."
            )
        if self.config.policy == "qllm":
            self._far_context.query.announce(start, end)

    @override
    def cut_pieces(self, positions: Sequence[int]) -> None:
        self._cuts = self._cuts.anew(positions)

    @override
    def question_scores(self) -> torch.Tensor | None:
        if not self._n_blocks:
            return None
        with on_device(self._window.key.device):  # the layer's attention, which sees to that, does not ask
            return self._far_context.question_scores(self._n_blocks)

    @override
    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        n = query.shape[1]
        self._scoring = scoring
        attended = self.step(query, key, value, scoring)
        if attended is not None:
            return attended
        single = self._launch if backend(query.device) == "triton" else self._step
        if n == 1:
            return single(query, key, value, scoring).transpose(0, 1)
        outs = []
        done = 0
        self._cuts = self._cuts.taken_up(self.n_seen)
        while done < n:
            size = self._launch_size(n - done)
            rows = slice(done, done + size)
            launch = single if size == 1 else self._launch
            outs.append(launch(query[:, rows], key[:, rows], value[:, rows], scoring))
            done += size
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)).transpose(0, 1)

    def _launch_size(self, left: int) -> int:
        """Tokens of the next launch: up to the end of a piece, and not beyond that of a question, which then takes effect."""
        size = min(left, self._cuts.last_end(self.n_seen + self._window.launch_size) - self.n_seen)
        question = self._far_context.query.awaited
        if question is not None:
            size = min(size, question[1] - self.n_seen)
        # attention mass is known only after a piece's attention, and the next piece may need it
        return self._pieces(self.n_seen, size)[0][1] if self._window.weighs_tokens else size

    # -------------------------------------------------------------- what is where

    def _eligible(self, start: int) -> int:
        """Blocks that a piece starting at `start` may look up."""
        config = self.config
        return max(0, (start - config.n_local - config.n_init) // config.block_size)

    def _oldest(self, n_eligible: int) -> int:
        """Absolute index of the oldest token in the window of a piece with `n_eligible` blocks to look up."""
        return self.config.n_init + n_eligible * self.config.block_size if n_eligible else 0

    def _evict(self, n_eligible: int, scoring: Scoring) -> None:
        """Turn the tokens of newly eligible blocks into pages."""
        new = n_eligible - self._n_blocks
        if new <= 0:
            return
        start = self.config.n_init + self._n_blocks * self.config.block_size
        self._n_blocks = n_eligible
        if self.config.uses_blocks:
            self._far_context.keep_blocks(*self._window.blocks(start, new, scoring))

    def _admit(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> tuple[torch.Tensor, int]:
        """Write new tokens to the window; returns their queries rotated for it and the blocks the first may look up."""
        first = self.n_seen
        ready = self._eligible(first)
        self._evict(ready, scoring)
        self._far_context.keep_initial(first, key, value)
        near = self._window.append(query, key, value, self._oldest(ready))
        self.n_seen += query.shape[1]
        return near, ready

    # -------------------------------------------------------------- attention of many pieces

    def _launch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of one run of pieces (the last may be short): [heads, n, value_dim]."""
        first, n = self.n_seen, query.shape[1]
        near, _ = self._admit(query, key, value, scoring)
        pieces = self._pieces(first, n)
        self._evict(self._eligible(pieces[-1][0]), scoring)
        outs = []
        for starts, length, far, seen in self._parts(pieces, query, first):
            rows = slice(starts[0] - first, starts[-1] - first + length)
            oldest = self._oldest(self._eligible(starts[0]))
            span = Span(
                slot=oldest - self._window.base,
                back=starts[0] - oldest,
                length=length if length > 1 else len(starts),  # single tokens share one window
                scale=scoring.scale,
                softcap=scoring.softcap,
            )
            out, lse = attend_pieces(near[:, rows], self._window.key, self._window.value, far, **span)
            if scoring.sinks is not None:
                out, lse = apply_sinks(out, lse, scoring.sinks)
            if n == 1 and self.on_weights is not None:
                mass = attention_mass(near, self._window.key, far, lse, **span)
                self._report(mass, torch.arange(oldest, self.n_seen, device=key.device), seen)
            self._window.note_lse(starts[0], lse)
            outs.append(out)
        self._far_context.query.capture(first, query, key, value, self.config.n_init)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _pieces(self, first: int, n: int) -> list[tuple[int, int]]:
        """Start and length of the pieces of a launch; each question token is one, once there are blocks."""
        question = self._far_context.query.awaited or (first + n, first + n)
        pieces = []
        start = first
        while start < first + n:
            end = min(self._cuts.end(start), first + n)
            if end > question[0] and self._eligible(start):
                end = max(start + 1, question[0])
            pieces.append((start, end - start))
            start = end
        return pieces

    def _batches(self, pieces: list[tuple[int, int]]) -> Iterator[tuple[list[int], int]]:
        """Runs of equally long pieces, (starts, length), whose windows begin equally far before them, or at one place."""
        run: list[int] = []
        alike = None
        for start, length in pieces:
            count = self._eligible(start)
            asks = self._far_context.query.awaits(start)
            kind = (length, count > 0, start - self._oldest(count) if length > 1 else count, asks)
            if run and (kind != alike or (length == 1 and len(run) == _TOGETHER)):
                yield run, alike[0] if alike else length
                run = []
            run.append(start)
            alike = kind
        if alike:
            yield run, alike[0]

    def _parts(
        self, pieces: list[tuple[int, int]], query: torch.Tensor, first: int
    ) -> Iterator[tuple[list[int], int, FarSegment | None, FarKeys | None]]:
        """Pieces attended to in one launch, (starts, length), with what they see outside their windows; each before the next.

        Args:
            pieces: Start and length of each.
            query: Their queries [heads, n, head_dim], un-rotated.
            first: Where these start.
        """
        heads, _, dim = query.shape
        for starts, length in self._batches(pieces):
            counts = [self._eligible(start) for start in starts]
            if not counts[0] or self._far_context.empty:
                yield starts, length, None, None
                continue
            far = self._far_context.far(query[:, starts[0] - first : starts[-1] - first + length])
            means = far.reshape(heads, len(starts), length, dim).float().mean(2).transpose(0, 1)
            oldest = [self._oldest(count) for count in counts]
            for some, seen in self._far_context.keys(means, counts, oldest, starts, length, self.on_lookup):
                rows = slice(some.start * length, some.stop * length)
                yield starts[some], length, seen.segment(far[:, rows]), seen

    def _report(self, mass: Mass, window: torch.Tensor, seen: FarKeys | None, last: torch.Tensor | None = None) -> None:
        """Hand out the weights of a single token; `window` has the absolute indices of the keys in its window.

        Keys that it does not see may have any index; none after `last` is handed out.
        """
        assert self.on_weights is not None
        parts = [x[0].flatten(1) for x in (mass.window, mass.pages, mass.loose) if x is not None]
        weights = torch.cat(parts, 1)
        positions = self._positions(window, seen, weights.shape[0])
        self.on_weights(weights, positions if last is None else torch.minimum(positions, last))

    def _positions(self, window: torch.Tensor, seen: FarKeys | None, kv_heads: int) -> torch.Tensor:
        """Absolute indices [kv_heads, m] of the keys a single token sees: those of its window [n], then those outside it."""
        if seen is None:
            return window.expand(kv_heads, -1)
        return torch.cat((window.expand(kv_heads, -1), self._far_context.positions(seen).expand(kv_heads, -1)), 1)

    # -------------------------------------------------------------- attention of one token, wherever the device says it is

    @override
    def prepare_step(self) -> GraphStep | None:
        config, window, far_context, first = self.config, self._window, self._far_context, self.n_seen
        recorded = self.on_lookup is not None or far_context.query.awaited is not None
        if self._scoring is None or window.tables is None or first < config.n_init or recorded:
            return None
        count = self._eligible(first)
        self._evict(count, self._scoring)
        oldest = self._oldest(count)
        window.make_room(oldest)
        slot = window.used
        chosen = min(count, config.topk) if config.uses_blocks else 0
        place = Place(first, slot, oldest - window.base, first - oldest, oldest, count, chosen)
        far = far_context.prepare_step(count) if count else ()
        return GraphStep((window.key, self.on_weights, count > 0, *far), place)

    @override
    def count(self) -> None:
        self.n_seen += 1
        self._window.used += 1

    @override
    def step_at(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, place: DevicePlace
    ) -> torch.Tensor:
        window = self._window
        new = window.arrival(query, key, value, place.slot)
        far = seen = None
        if self._n_blocks and not self._far_context.empty:
            near, far_query, seen = self._far_context.take_in(new, place)
            far = seen.segment(far_query)
        else:
            near, _ = rotate_append(new)
        window.place_query(place.slot, query)
        span = step_span(place, scoring)
        out, lse = attend_step(near, window.key, window.value, far, **span)
        if scoring.sinks is not None:
            out, lse = apply_sinks(out, lse, scoring.sinks)
        if self.on_weights is not None:
            mass = step_mass(near, window.key, far, lse, **span)
            self._report(mass, window_positions(place, window.key.shape[1]), seen, place.position)
        window.place_lse(place.slot, lse)
        return out

    # -------------------------------------------------------------- attention of one token on the host's numbers

    def _step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of a single token: [heads, 1, value_dim]. Its weights are at hand, so they can be recorded."""
        first = self.n_seen
        near, count = self._admit(query, key, value, scoring)
        window = self._window
        kv_heads, (heads, _, dim) = key.shape[0], query.shape
        oldest = self._oldest(count)
        rows = slice(oldest - window.base, window.used)

        def logits_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return segment_logits(query.view(kv_heads, -1, dim), key, scale=scoring.scale, softcap=scoring.softcap)

        logits, values = [logits_of(near, window.key[:, rows])], [window.value[:, rows]]
        seen = None
        if count and not self._far_context.empty:
            far = self._far_context.far(query)
            seen = self._far_context.keys_of_one(far.float().transpose(0, 1), count, oldest, first, self.on_lookup)
            if seen.blocks is not None:
                logits.append(logits_of(far, seen.blocks[0]))
                values.append(seen.blocks[1])
            logits.append(logits_of(far, seen.key[:, 0]))
            values.append(seen.value[:, 0])
            if seen.hidden is not None:
                logits[-1].masked_fill_(seen.hidden.transpose(0, 1), float("-inf"))
        if scoring.sinks is not None:
            logits.append(scoring.sinks.float().view(kv_heads, -1, 1))
        joint = logits[0] if len(logits) == 1 else torch.cat(logits, -1)
        weights = torch.softmax(joint, -1)
        shares, n_keys = weights.to(value.dtype), values[0].shape[1]
        out = torch.bmm(shares[..., :n_keys], values[0])
        for part in values[1:]:
            out = torch.baddbmm(out, shares[..., n_keys : n_keys + part.shape[1]], part)
            n_keys += part.shape[1]
        if self.on_weights is not None:
            positions = self._positions(torch.arange(oldest, self.n_seen, device=key.device), seen, kv_heads)
            self.on_weights(weights[..., :n_keys].sum(1), positions)
        if window.weighs_tokens:
            window.note_lse(first, torch.logsumexp(joint, -1).view(heads, 1))
        self._far_context.query.capture(first, query, key, value, self.config.n_init)
        return out.view(heads, 1, -1)

    # -------------------------------------------------------------- life

    @override
    def state(self) -> State:
        oldest = self._oldest(self._n_blocks)
        window = {f"window.{name}": part for name, part in self._window.state(oldest).items()}
        return {"counts": torch.tensor([self.n_seen, self._n_blocks]), **window, **self._far_context.state()}

    @override
    def restore(self, state: State, device: torch.device) -> None:
        self.n_seen, self._n_blocks = state["counts"].tolist()
        window = {name.removeprefix("window."): part for name, part in state.items() if name.startswith("window.")}
        self._window.restore(self._oldest(self._n_blocks), window, device)
        self._far_context.restore(state, device)

    @override
    def fork(self) -> Self:
        child = copy.copy(self)
        child._far_context = self._far_context.fork()
        child._window = self._window.fork()
        child.on_lookup = child.on_weights = child.numbers = None
        return child

    @override
    def nbytes(self) -> int:
        return self._far_context.nbytes() + self._window.nbytes()
