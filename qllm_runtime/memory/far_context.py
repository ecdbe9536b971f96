"""What lies outside the local window: initial tokens, pinned question and the blocks that are looked up."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Self, TypedDict

import torch

from qllm_kernels.choice import Pinned, to_device
from qllm_kernels.dispatch import append_and_choose, backend, choose_blocks, mean_keys, refine_pages, rotate_append
from qllm_kernels.refine import refine_choice
from qllm_kernels.rotary import Arrival
from qllm_kernels.summary import key_bounds
from qllm_runtime.config import CANDIDATES, MemoryConfig
from qllm_runtime.memory.base import Rotation, State
from qllm_runtime.memory.digest import BlockDigest
from qllm_runtime.memory.far_keys import FarKeys
from qllm_runtime.memory.offload import OffloadedStore
from qllm_runtime.memory.pinned_keys import PinnedKeys
from qllm_runtime.memory.places import DevicePlace
from qllm_runtime.memory.query import PinnedQuery
from qllm_runtime.memory.question_scores import QuestionScores
from qllm_runtime.memory.record import Lookup, LookupHook
from qllm_runtime.memory.store import BlockStore, PagedKeys

_TOGETHER = 256  # blocks taken from the host at a time


class Terms(TypedDict):
    """Arguments that both stages of a choice take."""

    scopes: int
    question: torch.Tensor | None
    weight: float


class FarContext:
    """Far keys of one layer. All of them are seen at the single distance `n_local - 1`, un-rotated.

    Args:
        config: Sizes and policy.
        rotation: The layer's rotary embedding.
        reserve: Blocks expected.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation, reserve: int) -> None:
        self._config = config
        self._rotation = rotation
        held = config.device_blocks
        quantised = config.offload_dtype == "fp8"
        self.store = BlockStore(reserve) if held is None else OffloadedStore(held, reserve, quantised=quantised)
        self.query = PinnedQuery()
        # scoring every key for every piece or token of a long text would cost more than the rest of its attention
        self._means = BlockDigest(mean_keys) if config.every_key else None
        self._bounds = BlockDigest(key_bounds) if config.every_key else None
        self._initial: tuple[torch.Tensor, torch.Tensor] | None = None
        self._far_map: torch.Tensor | None = None
        self._far_row: torch.Tensor | None = None
        self._pinned: PinnedKeys | None = None
        self._scored: tuple[torch.Tensor, QuestionScores] | None = None  # a question's tokens and its scores
        self._asked: torch.Tensor | None = None  # scores for the question that `take_in` reads

    @property
    def empty(self) -> bool:
        """Whether nothing can be seen here, now or later."""
        return self._config.n_init == 0 and not self._config.uses_blocks

    def keep_initial(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the initial tokens among tokens first, first + 1, ... ([kv_heads, n, head_dim])."""
        if first >= self._config.n_init:
            return
        rows = slice(0, self._config.n_init - first)
        key = key[:, rows]
        # StreamingLLM keeps initial tokens at positions 0, 1, ...; elsewhere far keys stay un-rotated
        key = self._rotation.rotate(key, first) if self._config.policy == "streaming" else key.clone()
        new = (key, value[:, rows].clone())
        if self._initial is not None:
            new = (torch.cat((self._initial[0], new[0]), 1), torch.cat((self._initial[1], new[1]), 1))
        self._initial = new

    def far(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries [..., head_dim] to the far distance, such that un-rotated keys can be multiplied."""
        return (x.float() @ self._turn(x)).to(x.dtype)

    def _turn(self, like: torch.Tensor) -> torch.Tensor:
        """What `far` multiplies queries [..., head_dim] by, [head_dim, head_dim]."""
        if self._far_map is None:
            config = self._config
            eye = torch.eye(like.shape[-1], device=like.device)[None]
            if config.policy == "streaming":
                self._far_map = self._rotation.rotate_all(eye, config.n_init + config.n_local - 1)[0]
            else:
                # position 0 of a key may still scale it (yarn, longrope), so that factor belongs to the query
                at_zero = self._rotation.rotate_all(eye, 0)[0]
                self._far_map = self._rotation.rotate_all(eye, config.n_local - 1)[0] @ at_zero.T
        return self._far_map

    def far_angles(self, query: torch.Tensor, rotary_dim: int, *, interleaved: bool) -> torch.Tensor:
        """`far` as `rotate_append` takes it, for rotations of pairs (`Rotation.tables`); the same tensor every time."""
        if self._far_row is None:
            turn = self._turn(query)
            column = torch.arange(rotary_dim, device=turn.device)
            first = column % 2 == 0 if interleaved else column < rotary_dim // 2
            apart = 1 if interleaved else rotary_dim // 2
            sin = turn[torch.where(first, column + apart, column - apart), column]
            self._far_row = torch.stack((turn.diagonal()[:rotary_dim], torch.where(first, -sin, sin)))
        return self._far_row

    def keep_blocks(self, key: torch.Tensor, value: torch.Tensor, summaries: torch.Tensor | None) -> None:
        """Keep blocks that left the window; arguments as for `BlockStore.append`."""
        self.store.append(key, value, summaries)
        for digest in (self._means, self._bounds):
            if digest is not None:
                digest.append(key)

    def look_up(
        self, lookup: torch.Tensor, counts: Sequence[int], starts: Sequence[int], length: int, hook: LookupHook | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose blocks for pieces.

        A block's score is that of the current tokens (eq. 6) plus `query_weight` times that of the question (eq. 5), each
        standardised over the eligible blocks: so the weight means the same for every model, layer and length (eq. 7).

        Where every key represents its block, tokens of a question are compared with every key, once. The mean query of a
        piece finds no single key; it is compared with means (the product of two means is the mean of all products, eq. 6).
        For other single tokens the bounds of each block's keys and the question choose candidates, and every key of theirs
        the blocks: what a token reads hardly grows with the text.

        Args:
            lookup: [pieces, heads, head_dim] fp32, each piece's mean query in far form.
            counts: Eligible blocks of each piece, ascending.
            starts, length: The pieces' first tokens and common length, for the record.
            hook: Gets the record of each lookup.

        Returns:
            ids [pieces, scopes, k] ascending, and valid [pieces, scopes, k] or None when all are.
        """
        config, n_blocks = self._config, counts[-1]
        single = length == 1 and not self.query.awaits(starts[0])
        question = self._asks(n_blocks, n_blocks)
        if self._bounds is not None and single and n_blocks > CANDIDATES * config.topk:
            bounds = self._bounds.first(n_blocks)
            alone = [self._choose_twice(row[None], bounds, counts[-1:], question) for row in lookup]
            ids, valid, candidates, scores = alone[0]
            if len(alone) > 1:
                ids, candidates, scores = (
                    torch.cat(each) for each in zip(*((a[0], *a[2:]) for a in alone), strict=True)
                )
            if hook is not None:
                whole = scores.new_full((*ids.shape[:2], n_blocks), float("-inf"))
                scores = whole.scatter(-1, candidates, scores)
        else:
            means = self._means if length > 1 else None
            parts = self.store.summaries(n_blocks) if means is None else means.first(n_blocks)
            ids, valid, scores = choose_blocks(lookup, parts, counts, config.topk, **self._terms(question))
        if hook is not None:
            shared = config.selection == "shared"
            for piece, (start, count) in enumerate(zip(starts, counts, strict=True)):
                chosen, seen = ids[piece, :, : min(config.topk, count)], scores[piece, :, :count]
                hook(Lookup(start, length, count, chosen[0] if shared else chosen, seen[0] if shared else seen))
        return ids, valid

    def _choose_twice(
        self, lookup: torch.Tensor, bounds: Sequence[torch.Tensor], counts: Sequence[int], question: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Candidates by their bounds, and the best of them by every key.

        Args:
            lookup: [1, heads, head_dim].
            bounds, counts, question: As `choose_blocks` takes them.

        Returns:
            ids and valid as `refine_choice` gives them, candidates and their scores [1, scopes, m].
        """
        m, terms = CANDIDATES * self._config.topk, self._terms(question)
        candidates, given, _ = choose_blocks(lookup, bounds, counts, m, bounds=True, **terms)
        ids, valid, scores = self._choose_among(lookup, candidates, given, counts, question)
        return ids, valid, candidates, scores

    def _choose_among(
        self,
        lookup: torch.Tensor,
        candidates: torch.Tensor,
        given: torch.Tensor | None,
        counts: Sequence[int] | torch.Tensor,
        question: torch.Tensor | None,
        pinned: Pinned | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The best of candidates [1, scopes, m] by every key, as `refine_pages` gives them; `given` says which there are."""
        topk, terms = self._config.topk, self._terms(question)
        if backend(lookup.device) == "torch":
            return refine_choice(lookup, self.store.keys(candidates), candidates, counts, topk, **terms)
        key, table = self.store.keys_in_pages(candidates, given)
        return refine_pages(lookup, key, table, candidates, counts, topk, pinned=pinned, **terms)

    def _terms(self, question: torch.Tensor | None) -> Terms:
        """What the terms of a score are made of, for this question's scores."""
        return Terms(scopes=self._scopes, question=question, weight=self._config.query_weight)

    def _asks(self, n_blocks: int, room: int) -> torch.Tensor | None:
        """The question's scores of `n_blocks` blocks, with `room` for more, [scopes, ...], if it takes part in lookups."""
        asking = self._scores_of_question(self._scopes)
        return None if asking is None else asking.scores(self.store.summaries(n_blocks, asking.known), room)

    def question_scores(self, n_blocks: int) -> torch.Tensor | None:
        """See `LayerMemory.question_scores`; groups of heads that choose together count alike."""
        scores = self._asks(n_blocks, n_blocks)
        return None if scores is None else scores[:, :n_blocks].sum(0)

    @property
    def _scopes(self) -> int:
        return self.store.kv_heads if self._config.selection == "per_kv_head" else 1

    def _scores_of_question(self, scopes: int) -> QuestionScores | None:
        """The question's scores, if it takes part in lookups."""
        tokens = self.query.tokens
        if tokens is None or not self._config.query_weight:
            return None
        if self._scored is None or self._scored[0] is not tokens:
            self._scored = (tokens, QuestionScores(self.far(tokens), scopes))
        return self._scored[1]

    def keys(
        self,
        lookup: torch.Tensor,
        counts: Sequence[int],
        oldest: Sequence[int],
        starts: Sequence[int],
        length: int,
        hook: LookupHook | None,
    ) -> Iterator[tuple[slice, FarKeys]]:
        """What pieces see: a few pieces at a time where blocks are fetched, to be attended to before the next are asked for.

        Args:
            lookup, counts, starts, length, hook: As in `look_up`.
            oldest: First token of each piece's window.
        """
        pieces = len(starts)
        if not self._config.uses_blocks:
            yield slice(0, pieces), self._initial_only(pieces)
            return
        ids, valid = self.look_up(lookup, counts, starts, length, hook)
        border = self._border(oldest, ids.device)
        in_turn = self.store.in_turn(ids, valid) if backend(ids.device) == "triton" else [(slice(0, pieces), None)]
        for rows, paged in in_turn:
            some, given = ids[rows], None if valid is None else valid[rows]
            twice = None
            if len(self.query.positions):
                twice = self._pinned_keys().hidden(some, None if border is None else border[rows])
            n_chosen = None if given is None else given[:, 0].sum(-1, dtype=torch.int32)
            yield rows, self._seen(some, given, n_chosen, twice, paged)

    def prepare_step(self, n_blocks: int) -> tuple[object, ...]:
        """Bring up to date what `take_in` reads for `n_blocks` eligible blocks, and return it."""
        if not self._config.uses_blocks or not n_blocks:
            return (self._initial,)
        self.store.synchronize(self.store.like[0].device)
        parts = self._parts()
        self._asked = self._asks(n_blocks, sum(part.shape[2] for part in parts))
        return (self._pinned_keys(), self._asked, *parts, *self.store.pages)

    def take_in(self, new: Arrival, place: DevicePlace) -> tuple[torch.Tensor, torch.Tensor, FarKeys]:
        """Rotate and append a single token, and find what it sees; the host never reads its place.

        Args:
            new: The token, after `prepare_step`.
            place: Where it is.

        Returns:
            Its query [heads, 1, head_dim] rotated for the window and in far form, and the keys outside the window.
        """
        config, far = self._config, self.far_angles(new.query, new.cos.shape[1], interleaved=new.interleaved)
        if not config.uses_blocks:
            near, far_query = rotate_append(new, far)
            assert far_query is not None
            return near, far_query, self._initial_only(1)
        counts, parts, terms = place.n_blocks, self._parts(), self._terms(self._asked)
        pinned = None
        if len(self.query.positions):
            kept = self._pinned_keys()
            hidden = torch.empty(1, self._scopes, len(kept.block), dtype=torch.bool, device=counts.device)
            pinned = Pinned(kept.block, kept.position, place.oldest, hidden)
        if self._bounds is None:
            near, far_query, ids, valid = append_and_choose(
                new, far, parts, counts, config.topk, pinned=pinned, **terms
            )
        else:
            m = CANDIDATES * config.topk
            near, far_query, candidates, given = append_and_choose(new, far, parts, counts, m, bounds=True, **terms)
            lookup = far_query.transpose(0, 1)
            ids, valid, _ = self._choose_among(lookup, candidates, given, counts, self._asked, pinned)
        twice, paged = None if pinned is None else pinned.hidden, self.store.in_place(ids, valid)
        return near, far_query, self._seen(ids, valid, place.n_chosen, twice, paged)

    def _parts(self) -> list[torch.Tensor]:
        """What single tokens are compared with, [heads, r, n, width] per generation, the last with its room for more blocks."""
        return [run.summaries for run in self.store.pages] if self._bounds is None else self._bounds.runs()

    def _initial_only(self, pieces: int) -> FarKeys:
        assert self._initial is not None
        key, value = (x[:, None].expand(-1, pieces, -1, -1) for x in self._initial)
        return FarKeys(key, value, None, None)

    def _seen(
        self,
        ids: torch.Tensor,
        valid: torch.Tensor | None,
        n_chosen: torch.Tensor | None,
        twice: torch.Tensor | None,
        paged: PagedKeys | None,
    ) -> FarKeys:
        """Initial tokens, chosen blocks and question; arguments as in `look_up`, `FarKeys` and `Pinned.hidden`."""
        pieces, scopes, k = ids.shape
        kept, asked = self._pinned_keys(), len(self.query.positions)
        pinned = [x.expand(-1, pieces, -1, -1) for x in (kept.key, kept.value)]
        if paged is not None:
            return FarKeys(pinned[0], pinned[1], twice, ids, paged, n_chosen)
        first, size = kept.key.shape[2] - asked, self._config.block_size
        key, value = (
            torch.cat((x[:, :, :first], blocks.flatten(2, 3), x[:, :, first:]), 2)
            for x, blocks in zip(pinned, self.store.gather(ids, valid), strict=True)
        )
        hidden = None
        if twice is not None or valid is not None:
            hidden = torch.zeros(pieces, scopes, key.shape[2], dtype=torch.bool, device=key.device)
            if valid is not None:
                hidden[:, :, first : first + k * size] = ~valid.repeat_interleave(size, dim=-1)
            if twice is not None:
                hidden[:, :, first + k * size :] = twice[:, :, first:]
        return FarKeys(key, value, hidden, ids, None, n_chosen)

    def positions(self, seen: FarKeys) -> torch.Tensor:
        """Absolute indices [scopes, m] of the far keys of a single piece: blocks that are apart, then the others, in order."""
        config, ids, device = self._config, seen.ids, seen.key.device
        parts = []
        if self._initial is not None:
            parts.append(torch.arange(self._initial[0].shape[1], device=device)[None])
        if ids is not None:
            within = torch.arange(config.block_size, device=device)
            blocks = (ids[0, :, :, None] * config.block_size + config.n_init + within).flatten(1)
            apart = seen.paged is not None or seen.blocks is not None
            n_initial = 0 if self._initial is None else self._initial[0].shape[1]
            parts.insert(0 if apart else len(parts), blocks)
            if len(self.query.positions) and seen.key.shape[2] > n_initial:
                parts.append(self.query.positions[None])
        scopes = 1 if ids is None else ids.shape[1]
        return torch.cat([part.expand(scopes, -1) for part in parts], 1)

    def keys_of_one(
        self, lookup: torch.Tensor, count: int, oldest: int, start: int, hook: LookupHook | None
    ) -> FarKeys:
        """What a single token sees, blocks apart from the other keys, which stay the same from token to token.

        Args:
            lookup, count, oldest, start, hook: As in `keys`, of one piece.
        """
        if not self._config.uses_blocks:
            return self._initial_only(1)
        ids, _ = self.look_up(lookup, [count], [start], 1, hook)
        key, value = (x.view(x.shape[0], -1, x.shape[-1]) for x in self.store.gather(ids))
        positions = self.query.positions
        asked = self.query.end - len(positions) < oldest  # else all of the question is in the window
        kept = self._pinned_keys(asked)
        hidden = kept.hidden(ids, self._border([oldest], ids.device)) if asked and len(positions) else None
        return FarKeys(kept.key, kept.value, hidden, ids, blocks=(key, value))

    def _pinned_keys(self, asked: bool = True) -> PinnedKeys:
        """Initial tokens and, if `asked`, the question's; there is a block."""
        kept, config = self._pinned, self._config
        if kept is None or kept.question is not self.query.tokens or kept.asked != asked:
            kept = self._pinned = PinnedKeys.of(
                self._initial, self.query, self.store.like, asked=asked, n_init=config.n_init, size=config.block_size
            )
        return kept

    def _border(self, oldest: Sequence[int], device: torch.device) -> torch.Tensor | None:
        """First tokens of windows, [pieces]; None where none reaches back to the question."""
        return to_device(oldest, device) if self.query.end > min(oldest) else None

    def state(self) -> State:
        """Initial tokens and blocks on the host."""
        found: State = {}
        if self._initial is not None:
            found["initial.key"], found["initial.value"] = (x.cpu() for x in self._initial)
        if len(self.store):
            key, value, summaries = self.store.contents()
            found |= {"blocks.key": key, "blocks.value": value}
            if summaries is not None:
                found["blocks.summaries"] = summaries
        return found

    def restore(self, state: State, device: torch.device) -> None:
        """Keep what `state` returned."""
        if "initial.key" in state:
            self._initial = state["initial.key"].to(device), state["initial.value"].to(device)
        if "blocks.key" in state:
            key, value, summaries = state["blocks.key"], state["blocks.value"], state.get("blocks.summaries")
            for at in range(0, key.shape[1], _TOGETHER):
                rows = slice(at, at + _TOGETHER)
                compact = None if summaries is None else summaries[:, :, rows].to(device)
                self.keep_blocks(key[:, rows].to(device), value[:, rows].to(device), compact)

    def fork(self) -> Self:
        """An independent continuation that shares initial tokens and blocks."""
        child = copy.copy(self)
        child.store = self.store.fork()
        child.query = self.query.fork()
        child._means = None if self._means is None else self._means.fork()
        child._bounds = None if self._bounds is None else self._bounds.fork()
        child._pinned = child._scored = child._asked = None
        return child

    def nbytes(self) -> int:
        """Bytes of pages, their digests and initial tokens."""
        kept: tuple[torch.Tensor, ...] = self._initial or ()
        digests = sum(digest.nbytes() for digest in (self._means, self._bounds) if digest is not None)
        asked = 0 if self._asked is None else self._asked.nbytes
        return self.store.nbytes() + digests + asked + sum(x.nbytes for x in kept)
