"""The choice of blocks by tokens and question, in one stage and in two, and all launches of one layer of a step together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.memory_operations import EVERY_KEY_BLOCKS, MemoryOperations
from benchmarks.gpu.operations import Rows, as_double, relative_error, verdict
from benchmarks.gpu.timing import copies, spent
from qllm_kernels import choice, dispatch, refine, rotary
from qllm_kernels.choice import Pinned

CANDIDATES = 4  # per block looked up


class ChoiceOperations(MemoryOperations):
    """Random summaries, bounds and scores of a question; see :class:`Operations`."""

    def _guided(self, pieces: int, *, bounds: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `choose_blocks` with counts on the device."""
        s = self.shape
        lookup = self._random(pieces, s.heads, s.dim).float()
        summaries = self._random(s.kv_heads, 1, s.n_blocks, s.dim * (2 if bounds else 1))
        counts = self._numbers(*[s.n_blocks] * pieces)
        kind = {"scopes": 1, "question": self._random(1, s.n_blocks).float(), "weight": 1.0, "bounds": bounds}
        return (lookup, [summaries], counts, s.topk), kind

    def _candidates(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `refine_pages` for one token."""
        s = self.shape
        n_pages, m = min(s.n_blocks, EVERY_KEY_BLOCKS), min(CANDIDATES * s.topk, s.n_blocks)
        table = torch.randperm(n_pages)[:m].sort().values.to(self.device)[None, None]
        lookup, page_key = self._random(1, s.heads, s.dim).float(), self._random(s.kv_heads, n_pages, s.block, s.dim)
        kind = {"scopes": 1, "question": self._random(1, n_pages).float(), "weight": 1.0}
        return (lookup, page_key, table, table, self._numbers(n_pages), s.topk), kind

    # -------------------------------------------------------------- correctness

    def errors(self) -> Rows:
        rows: Rows = {
            f"choice beside a question, {name}": partial(self._guided_error, pieces, bounds=bounds)
            for name, pieces, bounds in (("bounds, decode", 1, True), ("means, prefill", 4, False))
        }
        rows["choice among candidates"] = self._candidates_error
        rows["append and choice, decode"] = self._append_and_choice_error
        return rows

    def _guided_error(self, pieces: int, *, bounds: bool) -> dict[str, Any]:
        given, kind = self._guided(pieces, bounds=bounds)
        found = dispatch.choose_blocks(*given, **kind)
        plain = choice.choose_blocks(*given, **kind)
        lookup, (summaries,), counts, topk = given
        double = kind | {"question": as_double(kind["question"])}
        exact = choice.choose_blocks(
            as_double(lookup.to(self.dtype)), [as_double(summaries)], counts.cpu(), topk, **double
        )
        return self._chosen(found, plain, exact)

    def _candidates_error(self) -> dict[str, Any]:
        given, kind = self._candidates()
        found, plain = dispatch.refine_pages(*given, **kind), refine.refine_pages(*given, **kind)
        lookup, page_key, table, candidates, counts, topk = given
        double = kind | {"question": as_double(kind["question"])}
        exact = refine.refine_pages(
            as_double(lookup.to(self.dtype)),
            as_double(page_key),
            table.cpu(),
            candidates.cpu(),
            counts.cpu(),
            topk,
            **double,
        )
        return self._chosen(found, plain, exact, candidates)

    def _append_and_choice_error(self) -> dict[str, Any]:
        """Both rotations, and whether the ids are those that the choice alone finds by the same far query."""
        new = self._arrival(1)
        angles = torch.stack((new.cos[0], new.sin[0]))
        (_, parts, counts, topk), kind = self._guided(1, bounds=True)
        near, far_query, ids, _ = dispatch.append_and_choose(new, angles, parts, counts, topk, **kind)
        alone, _, scores = dispatch.choose_blocks(far_query.transpose(0, 1), parts, counts, topk, **kind)
        # the rotations of both launches may differ in their last bits
        worst = scores.gather(-1, alone).amin(-1) - scores.gather(-1, ids).amin(-1)
        row = new.positions
        exact, plain = (
            [
                rotary.rotate(x, c.to(x.device), s.to(x.device))
                for c, s in ((new.cos[row], new.sin[row]), angles.split(1))
            ]
            for x in (as_double(new.query), new.query)
        )
        error, plain_error = (
            max(relative_error(x, y) for x, y in zip(each, exact, strict=True)) for each in ((near, far_query), plain)
        )
        return verdict(error, plain_error, bool(worst.abs().max() < 1e-2))

    def _chosen(self, found: Any, plain: Any, exact: Any, candidates: torch.Tensor | None = None) -> dict[str, Any]:
        """Errors of the scores, and whether the ids are those of the best scores found."""
        ids, _, scores = found
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : ids.shape[2]].sort(-1).values
        if candidates is not None:
            best = candidates.gather(-1, best)
        return verdict(
            relative_error(scores, exact[2]), relative_error(plain[2], exact[2]), bool(torch.equal(ids, best))
        )

    # -------------------------------------------------------------- speed

    def speeds(self) -> Rows:
        rows: Rows = {
            f"choice beside a question, {name}": partial(self._guided_speed, pieces, bounds=bounds)
            for name, pieces, bounds in (("bounds, decode", 1, True), ("means, prefill", self.shape.pieces, False))
        }
        rows["choice among candidates"] = self._candidates_speed
        if self.device.type == "cuda":
            rows["layer of a step"] = self._step_speeds
        return rows

    def _guided_speed(self, pieces: int, *, bounds: bool) -> dict[str, float]:
        s = self.shape

        def make() -> Callable[[], object]:
            given, kind = self._guided(pieces, bounds=bounds)
            return partial(dispatch.choose_blocks, *given, **kind)

        return self._bandwidth(make, s.kv_heads * s.n_blocks * s.dim * (2 if bounds else 1) * self.dtype.itemsize)

    def _candidates_speed(self) -> dict[str, float]:
        def make() -> Callable[[], object]:
            given, kind = self._candidates()
            return partial(dispatch.refine_pages, *given, **kind)

        return self._bandwidth(make, self._candidate_bytes)

    @property
    def _candidate_bytes(self) -> int:
        """Bytes of the keys that `_candidates` has compared."""
        s = self.shape
        return min(CANDIDATES * s.topk, s.n_blocks) * s.kv_heads * s.block * s.dim * self.dtype.itemsize

    def _step_speeds(self) -> dict[str, Any]:
        """One layer of a step, from projections to attention, in three launches, none of which waits for the host."""
        layers = copies(self._layer, self._candidate_bytes, self.device)
        layers[0]()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layers[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return spent(layers, self.device) | {"copies": len(layers)}

    def _layer(self) -> Callable[[], object]:
        s = self.shape
        new = self._arrival(1)
        angles = torch.stack((new.cos[0], new.sin[0]))
        (_, key, value, far), sizes = self._segments(1, 1, paged=True)
        (_, page_key, _, _, counts, _), asked = self._candidates()
        (_, parts, _, _), kind = self._guided(1, bounds=True)
        slot, back = self._numbers(0), self._numbers(s.n_local)
        tokens = torch.arange(s.n_init, device=self.device)
        hidden = torch.empty(1, 1, s.n_init, dtype=torch.bool, device=self.device)
        pinned = Pinned(tokens // s.block, tokens, self._numbers(s.n_init), hidden)

        def layer() -> None:
            near, far_query, candidates, _ = dispatch.append_and_choose(
                new, angles, parts, counts, CANDIDATES * s.topk, **kind
            )
            lookup = far_query.transpose(0, 1)
            ids, _, _ = dispatch.refine_pages(
                lookup, page_key, candidates, candidates, counts, s.topk, **asked, pinned=pinned
            )
            seen = replace(far, query=far_query, table=ids, page_key=page_key, page_value=page_key, hidden=hidden)
            dispatch.attend_step(near, key, value, seen, slot=slot, back=back, scale=sizes["scale"])

        return layer
