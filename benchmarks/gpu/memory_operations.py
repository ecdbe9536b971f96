"""What surrounds attention: mass of keys, every-key selection, rotation and append, summaries, pages and their table."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.operations import Operations, Rows, as_double, relative_error, verdict
from benchmarks.gpu.timing import n_copies, spent
from qllm_kernels import dispatch, mass, pages, published, residency, rotary, select
from qllm_kernels.attention import FarSegment
from qllm_kernels.residency import Residency
from qllm_kernels.rotary import Arrival, Destination

EVERY_KEY_BLOCKS = 2048  # 131,072 tokens in blocks of 64: 268 MB of keys per layer in the 8B shape
TOKENS = 16  # of a question


class MemoryOperations(Operations):
    """Random data for the operations around attention; see :class:`Operations`."""

    def _pinned(self, *sizes: int) -> torch.Tensor:
        made = torch.empty(sizes, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        return made.copy_(self._random(*sizes))

    def _numbers(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    # -------------------------------------------------------------- arguments

    def _mass(self, pieces: int, length: int) -> Callable[..., mass.Mass]:
        (near, key, value, far), sizes = self._segments(pieces, length, paged=True)
        _, lse = dispatch.attend_pieces(near, key, value, far, **sizes)

        def call(serve: Any = dispatch.attention_mass, double: bool = False) -> mass.Mass:
            given: Any = (near, key, far, lse)
            if double:
                parts: dict[str, Any] = {name: None if x is None else as_double(x) for name, x in vars(far).items()}
                given = (as_double(near), as_double(key), FarSegment(**parts), as_double(lse))
            found: mass.Mass = serve(*given, window=length == 1, **sizes)
            return found

        return call

    def _every_key(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of a question's tokens, and every key of all blocks."""
        s = self.shape
        every = self._random(s.kv_heads, min(s.n_blocks, EVERY_KEY_BLOCKS), s.block, s.dim)
        return self._random(tokens, s.heads, s.dim).float(), every.transpose(1, 2)

    def _arrival(self, n: int) -> Arrival:
        s = self.shape
        query, key, value = (self._random(heads, n, s.dim) for heads in (s.heads, s.kv_heads, s.kv_heads))
        angles = torch.rand(s.n_local + n, s.dim // 2, device=self.device).repeat(1, 2)
        rows = torch.arange(s.n_local, s.n_local + n, device=self.device)
        buffers = torch.zeros(2, 2, s.kv_heads, s.n_local + n, s.dim, dtype=self.dtype, device=self.device)
        places = [Destination(key_rows, value_rows, rows) for key_rows, value_rows in buffers]
        return Arrival(query, key, value, angles.cos(), angles.sin(), rows, *places)

    def _published(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        s = self.shape
        n_blocks = max(1, s.piece // s.block)
        key = self._random(s.kv_heads, n_blocks, s.block, s.dim)
        reach = n_blocks * s.block + s.n_local - 1
        query, lse = self._random(s.heads, reach, s.dim), self._random(s.heads, reach).float() + 12
        sizes = {"n_local": s.n_local, "repr_topk": s.r, "scale": s.dim**-0.5}
        return (key, key.flatten(1, 2), query, lse), sizes

    def _slab(self, turns: int = 8) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Pages of the host, a hot buffer, for each turn moves of as many other pages as a piece chooses, and their number."""
        s = self.shape
        n = turns * s.topk
        hot = self._random(s.kv_heads, 2 * s.topk, s.block, s.dim)
        places = torch.arange(s.topk)
        moves = [torch.stack((page, places), -1)[None].to(self.device) for page in torch.randperm(n).view(turns, -1)]
        return self._pinned(s.kv_heads, n, s.block, s.dim), hot, moves, self._numbers(s.topk)

    @property
    def _moved(self) -> int:
        """Bytes of the pages that are moved in a turn."""
        s = self.shape
        return s.kv_heads * s.topk * s.block * s.dim * self.dtype.itemsize

    # -------------------------------------------------------------- correctness

    def errors(self) -> Rows:
        return {
            "mass, decode": partial(self._mass_error, 1, 1),
            "mass, prefill": partial(self._mass_error, 2, self.shape.piece),
            "question's tokens by every key": self._every_key_error,
            "rotate and append": self._append_error,
            "published summaries": self._published_error,
            "prefix sums": self._prefix_error,
            "page copies": self._copies_error,
            "table of pages": self._table_error,
        }

    def _mass_error(self, pieces: int, length: int) -> dict[str, Any]:
        call = self._mass(pieces, length)
        found, plain, exact = call(), call(mass.attention_mass), call(mass.attention_mass, double=True)
        error, plain_error = (
            max(relative_error(getattr(x, part), y) for part, y in vars(exact).items() if y is not None)
            for x in (found, plain)
        )
        return verdict(error, plain_error, True)

    def _every_key_error(self) -> dict[str, Any]:
        lookup, every = self._every_key(4)
        exact_scores = select.block_scores(as_double(lookup.to(self.dtype)), as_double(every), scopes=1)
        error, plain_error = (
            relative_error(serve(lookup, every, scopes=1), exact_scores)
            for serve in (dispatch.block_scores, select.block_scores)
        )
        return verdict(error, plain_error, True)

    def _published_error(self) -> dict[str, Any]:
        given, sizes = self._published()
        exact_means = published.published_means(*(as_double(x) for x in given), **sizes)
        means = dispatch.published_means(*given, **sizes)
        # where two keys receive nearly the same, the rounded ones may choose the other
        alike = (means.double().cpu() - exact_means).abs().amax(-1) < 0.05 * exact_means.abs().max()
        return {"alike": alike.double().mean().item(), "ok": bool(alike.double().mean() > 0.98)}

    def _prefix_error(self) -> dict[str, Any]:
        query = self._random(self.shape.kv_heads, self.shape.n_local + self.shape.piece, self.shape.dim)
        sums = as_double(query).cumsum(1)
        error = relative_error(dispatch.query_prefix(query)[:, 1:], sums)
        return verdict(error, relative_error(query.float().cumsum(1), sums), True)

    def _append_error(self) -> dict[str, Any]:
        new = self._arrival(self.shape.piece)
        query, key, value, cos, sin, rows = new.query, new.key, new.value, new.cos, new.sin, new.positions
        window, raw = new.window, new.raw
        near, _ = dispatch.rotate_append(new)
        turned = [rotary.rotate(as_double(x), cos[rows].cpu(), sin[rows].cpu()) for x in (query, key)]
        plain = rotary.rotate(query, cos[rows], sin[rows])
        error = max(relative_error(near, turned[0]), relative_error(window.key[:, rows], turned[1]))
        placed = [(raw.key, key), *((place.value, value) for place in (window, raw))]
        kept = all(buffer is not None and torch.equal(buffer[:, rows], x) for buffer, x in placed)
        return verdict(error, relative_error(plain, turned[0]), kept)

    def _copies_error(self) -> dict[str, Any]:
        slab, hot, (moves, *_), counts = self._slab()
        origin, target = moves[0, :, 0].cpu(), moves[0, :, 1]
        dispatch.copy_pages(slab, hot, moves, counts)
        exact = torch.equal(hot[:, target].cpu(), slab[:, origin])
        fp8 = torch.zeros(slab.shape, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(slab.shape[:2])
        if self.device.type == "cuda":
            fp8, scales = fp8.pin_memory(), scales.pin_memory()
        back = moves.flip(-1)
        dispatch.quantise_pages(hot, fp8, scales, back, counts)
        dispatch.dequantise_pages(fp8, scales, hot, moves, counts)
        self._wait()
        there, again = torch.zeros(slab.shape, dtype=torch.float8_e4m3fn), torch.zeros(slab.shape[:2])
        pages.quantise_pages(slab, there, again, torch.stack((origin, origin), -1)[None], counts.cpu())
        same = (there.view(torch.uint8) == fp8.view(torch.uint8))[:, origin].double().mean().item()
        error = relative_error(hot[:, target], as_double(slab[:, origin]))
        return {"error": error, "same_bytes": same, "ok": exact and same > 0.999 and error < 0.04}

    def _table_error(self) -> dict[str, Any]:
        k, n_pages = self.shape.topk, 8 * self.shape.topk
        states = [Residency.empty(1, n_pages, 2 * k, where) for where in (self.device, torch.device("cpu"))]
        for step in range(6):
            ids = (torch.rand(1, 1, n_pages) + torch.arange(n_pages).roll(9 * step) / k).argsort(-1)[..., :k]
            found = dispatch.admit_pages(states[0], ids.to(self.device), None)
            expected = residency.admit_pages(states[1], ids, None)
            n = int(expected[2][0])
            if not (
                torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1][:, :n].cpu(), expected[1][:, :n])
            ):
                return {"step": step, "ok": False}
        return {"ok": True}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -------------------------------------------------------------- speed

    def speeds(self) -> Rows:
        s = self.shape
        return {
            "mass, decode": self._step_mass_speed,
            "mass outside the window, prefill": self._piece_mass_speed,
            "question's tokens by every key": self._every_key_speed,
            "rotate and append, decode": partial(self._append_speed, 1),
            "rotate and append, prefill": partial(self._append_speed, s.pieces * s.piece),
            "published summaries of a piece": self._published_speed,
            "prefix sums": self._prefix_speed,
            "pages from the host": self._fetch_speed,
            "pages to the host": self._evict_speed,
            "fp8 pages from the host": self._fp8_speed,
            "table of pages": self._table_speed,
        }

    def _step_mass_speed(self) -> dict[str, Any]:
        s = self.shape
        keys = s.n_local + 1 + s.n_init + s.topk * s.block
        return self._bandwidth(lambda: self._mass(1, 1), s.kv_heads * keys * s.dim * self.dtype.itemsize)

    def _piece_mass_speed(self) -> dict[str, Any]:
        s = self.shape
        work = 2 * s.heads * s.pieces * s.piece * (s.n_init + s.topk * s.block) * s.dim
        return self._rate([self._mass(s.pieces, s.piece)], work)

    def _every_key_speed(self) -> dict[str, Any]:
        s = self.shape
        read = s.kv_heads * min(s.n_blocks, EVERY_KEY_BLOCKS) * s.block * s.dim * self.dtype.itemsize
        return self._bandwidth(lambda: partial(dispatch.block_scores, *self._every_key(TOKENS), scopes=1), read)

    def _append_speed(self, n: int) -> dict[str, Any]:
        s = self.shape
        moved = (2 * s.heads + 6 * s.kv_heads) * n * s.dim * self.dtype.itemsize
        return self._bandwidth(lambda: partial(dispatch.rotate_append, self._arrival(n)), moved)

    def _published_speed(self) -> dict[str, Any]:
        arguments, sizes = self._published()
        return spent([partial(dispatch.published_means, *arguments, **sizes)], self.device)

    def _prefix_speed(self) -> dict[str, Any]:
        s = self.shape
        shape = (s.kv_heads, s.n_local + s.pieces * s.piece, s.dim)
        moved = math.prod(shape) * (2 * self.dtype.itemsize + 4)
        return self._bandwidth(lambda: partial(dispatch.query_prefix, self._random(*shape)), moved)

    def _fetch_speed(self) -> dict[str, Any]:
        slab, hot, moves, counts = self._slab(n_copies(self._moved, self.device))
        calls = iter([partial(dispatch.copy_pages, slab, hot, each, counts) for each in moves])
        return self._bandwidth(lambda: next(calls), self._moved, "from_host_gb_s")

    def _evict_speed(self) -> dict[str, Any]:
        slab, hot, moves, counts = self._slab(n_copies(self._moved, self.device))
        calls = iter([partial(dispatch.copy_pages, hot, slab, each.flip(-1), counts) for each in moves])
        return self._bandwidth(lambda: next(calls), self._moved, "to_host_gb_s")

    def _fp8_speed(self) -> dict[str, Any]:
        moved = self._moved // self.dtype.itemsize
        slab, hot, moves, counts = self._slab(n_copies(moved, self.device))
        fp8 = torch.empty(slab.shape, dtype=torch.float8_e4m3fn, pin_memory=slab.is_pinned()).copy_(slab)
        scales = torch.ones(slab.shape[:2], device=self.device)
        calls = iter([partial(dispatch.dequantise_pages, fp8, scales, hot, each, counts) for each in moves])
        return self._bandwidth(lambda: next(calls), moved, "from_host_gb_s")

    def _table_speed(self) -> dict[str, Any]:
        slab, hot, moves, _ = self._slab()
        state = Residency.empty(1, slab.shape[1], hot.shape[1], self.device)
        chosen = [each[None, :, :, 0].contiguous() for each in moves]
        return spent([partial(dispatch.admit_pages, state, ids, None) for ids in chosen], self.device)
