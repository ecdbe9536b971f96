"""Faithful mode: the memory of the published Q-LLM research code, number for number, quirks included.

Meant for comparisons with published results (arXiv 2406.07528), not for serving: it keeps the whole history on the
device and recomputes what the published code recomputes. Everything is computed in the dtype of the model.
"""

from __future__ import annotations

from typing import Self

import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError, UnsupportedModelError
from qllm_runtime.memory.base import LayerMemory, Rotation, Scoring
from qllm_runtime.memory.record import Lookup
from qllm_runtime.memory.segments import Rows, Segment, attend_jointly, distances


class PublishedMemory(LayerMemory):
    """Initial tokens, local window and looked-up blocks as the published code has them (policies qllm and infllm).

    The window of a piece of queries is initial tokens + chosen blocks + local tokens (paper section 3.2, eq. 2; the
    code has no query segment of its own). Far keys stay un-rotated and are seen by queries rotated to n_local - 1.
    One call of :meth:`append` must be one forward call of the model, because results depend on how tokens are cut
    into calls: pieces of `exec_block_size` restart with each call.

    Deviations of the code from the paper that are reproduced here:

    * A block is represented by the mean of its `repr_topk` keys with most received attention mass (in place of
      eq. 4), the question by the mean of its `repr_topk` most attended queries (in place of eq. 5).
    * The question is taken once, when the sequence first outgrows the window, from the queries of the call at hand:
      its span is then relative to that call, not to the sequence.
    * Tokens between window and newest block are visible to all queries of a piece, also to those that see them
      locally as well; their weight then counts twice.

    Attributes:
        n_initial: Initial tokens captured so far.
        query_vector: [heads * head_dim] question vector, or None while there is none.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation, query_span: tuple[int, int] | None = None) -> None:
        """Create the memory of one layer.

        Args:
            config: Sizes and policy; `chunk_size` is up to whoever cuts the calls.
            rotation: Rotary embedding of the layer.
            query_span: Tokens [start, end) of the question, with the published slicing rules; ignored by infllm.

        Raises:
            InvalidConfigError: The policy keeps no blocks.
        """
        if not config.uses_blocks:
            raise InvalidConfigError(f"PublishedMemory has no policy {config.policy!r}; use PublishedWindow.")
        self.n_seen = 0
        self.n_initial = 0
        self.query_vector: torch.Tensor | None = None
        self._config = config
        self._rotation = rotation
        self._query_span = query_span
        self._keys = Rows()
        self._values = Rows()
        self._summaries = Rows()
        self._initial_complete = False
        self._remainder_start = 0
        self._mass: torch.Tensor | None = None

    @property
    def n_blocks(self) -> int:
        """Blocks evicted from the window so far."""
        return self._summaries.length

    @property
    def summaries(self) -> torch.Tensor | None:
        """[n_blocks, heads * head_dim] one vector per block, or None while there is no block."""
        return self._summaries.rows[0] if self.n_blocks else None

    @property
    def remainder_scores(self) -> torch.Tensor | None:
        """[heads, remainder] attention mass received by each token that is neither initial nor in a block yet."""
        return self._mass

    @torch.no_grad()
    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Take in the n tokens of one forward call; see the base class.

        Raises:
            InvalidRequestError: The published code would fail here (see `_take_question`). The memory is of no
                further use then.
            UnsupportedModelError: Soft caps or sinks, which the published code does not know.
        """
        _refuse_unknown(scoring)
        heads, n, _ = query.shape
        begin, end = self.n_seen, self.n_seen + n
        self._keys.extend(key)
        self._values.extend(value)
        zeros = query.new_zeros(heads, n)
        mass = zeros if self._mass is None else torch.cat((self._mass, zeros), dim=1)
        mass_start = self._remainder_start
        far = self._rotation.rotate_all(query, self._config.n_local - 1)
        output = query.new_empty(n, heads, value.shape[2])
        for start in range(begin, end, self._config.exec_block_size):
            stop = min(start + self._config.exec_block_size, end)
            piece = slice(start - begin, stop - begin)
            chosen = self._choose(far[:, piece], start)
            output[piece], received = self._attend(query[:, piece], far[:, piece], start, chosen, scoring.scale)
            mass[:, stop - mass_start - received.shape[1] : stop - mass_start] += received
            self._capture_initial(stop, far, mass)
            self._evict(stop, mass[:, self._remainder_start - mass_start :])
        self._mass = mass[:, self._remainder_start - mass_start :]
        self.n_seen = end
        return output

    def set_query(self, start: int, end: int) -> None:
        """Set the question's span, as the published code does with the first call; without effect for infllm.

        Raises:
            InvalidRequestError: Tokens have been appended: the published code would ignore the span silently.
        """
        if self._config.policy == "infllm":
            return
        if self.n_seen:
            raise InvalidRequestError(
                "With faithful=True the question must be known before the first token is read (the published code "
                "ignores later ones). Read the document again with the question, or use faithful=False."
            )
        self._query_span = (start, end)

    def fork(self) -> Self:
        """An independent continuation. Copies everything: this memory is for comparisons, not for many questions."""
        other = type(self)(self._config, self._rotation, self._query_span)
        other.n_seen, other.n_initial = self.n_seen, self.n_initial
        other.query_vector = self.query_vector
        other._keys, other._values = self._keys.copy(), self._values.copy()
        other._summaries = self._summaries.copy()
        other._initial_complete = self._initial_complete
        other._remainder_start = self._remainder_start
        other._mass = None if self._mass is None else self._mass.clone()
        return other

    def nbytes(self) -> int:
        """Bytes allocated for keys, values, summaries and attention mass."""
        loose = sum(x.nbytes for x in (self._mass, self.query_vector) if x is not None)
        return self._keys.nbytes + self._values.nbytes + self._summaries.nbytes + loose

    def _choose(self, far: torch.Tensor, start: int) -> torch.Tensor:
        """Blocks for one piece, shared by all heads: the mean query's dot product plus the question's (eqs. 6, 7)."""
        scores = None
        ids = torch.empty(0, dtype=torch.long, device=far.device)
        summaries = self.summaries
        if summaries is not None:
            scores = summaries @ far.mean(dim=1).flatten()
            if self.query_vector is not None:
                scores = scores + self._config.query_weight * (summaries @ self.query_vector)
            ids = scores.topk(min(self._config.topk, self.n_blocks)).indices.sort().values
        if self.on_lookup is not None:
            self.on_lookup(Lookup(start, far.shape[1], self.n_blocks, ids, scores))
        return ids

    def _attend(
        self, query: torch.Tensor, far: torch.Tensor, start: int, chosen: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [l, heads, head_dim] of the piece at `start` and the mass each local key receives [heads, keys]."""
        config, stop = self._config, start + query.shape[1]
        local_start = max(0, start - config.n_local)
        far_end = max(self._remainder_start, stop - config.n_local)

        def far_segment(rows: torch.Tensor) -> torch.Tensor:
            blocks = self._blocks(rows, config.n_init, self.n_blocks)[:, chosen].flatten(1, 2)
            return torch.cat((blocks, rows[:, : self.n_initial], rows[:, self._remainder_start : far_end]), dim=1)

        keys, values = self._keys.rows, self._values.rows
        distance = distances(start, stop, local_start, stop, query.device)
        output, weights = attend_jointly(
            Segment(
                self._rotation.rotate(query, start - local_start),
                self._rotation.rotate(keys[:, local_start:stop], 0),
                values[:, local_start:stop],
                (distance >= 0) & (distance < config.n_local),
            ),
            Segment(far, far_segment(keys), far_segment(values), None),
            scale,
        )
        if self.on_weights is not None and query.shape[1] == 1:
            everything = torch.arange(stop, device=query.device).view(1, stop, 1)
            positions = torch.cat((everything[:, local_start:], far_segment(everything)), dim=1).flatten()
            self.on_weights(*_by_group(weights, positions, keys.shape[0]))
        return output, weights[:, :, : stop - local_start].sum(dim=1)

    def _blocks(self, rows: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """View of `count` whole blocks from token `start` on: [kv_heads, count, block_size, head_dim]."""
        groups, _, width = rows.shape
        size = self._config.block_size
        return rows[:, start : start + count * size].view(groups, count, size, width)

    def _capture_initial(self, stop: int, far: torch.Tensor, mass: torch.Tensor) -> None:
        """Move tokens that left the window to the initial ones until there are n_init; try to take the question."""
        outside = stop - self._remainder_start - self._config.n_local
        if self._initial_complete or outside <= 0:
            return
        count = min(self._config.n_init - self.n_initial, outside)
        self.n_initial += count
        self._remainder_start += count
        self._initial_complete = self.n_initial == self._config.n_init
        if self._config.policy == "qllm" and self._query_span is not None and self.query_vector is None:
            self._take_question(*self._query_span, far, mass)

    def _take_question(self, start: int, end: int, far: torch.Tensor, mass: torch.Tensor) -> None:
        """Make the question vector from the most attended queries of the span (in place of eq. 5).

        As published, the span slices the queries of the current call and the remainder as it was when that call
        began. Both start at token 0 only if the window is outgrown in the first call; otherwise the queries belong
        to other tokens than the scores, or do not exist.
        """
        queries, scores = far[:, start:end], mass[:, start:end]
        if end <= start or queries.shape[1] == 0:
            return
        best = scores.topk(min(self._config.repr_topk, scores.shape[1]), dim=1).indices
        if best.shape[1] == 0 or int(best.max()) >= queries.shape[1]:
            raise InvalidRequestError(
                f"The published code fails on this request: question span ({start}, {end}) exceeds the forward call of "
                f"{far.shape[1]} tokens in which the sequence outgrows n_local={self._config.n_local}. Use a "
                "chunk_size larger than n_local, a longer prompt, or faithful=False."
            )
        picked = queries.gather(1, best[:, :, None].expand(-1, -1, queries.shape[2]))
        self.query_vector = picked.mean(dim=1).flatten()

    def _evict(self, stop: int, mass: torch.Tensor) -> None:
        """Turn whole blocks beyond the window into memory blocks with one summary each (in place of eq. 4).

        Args:
            stop: End of what has been attended to.
            mass: [heads, n] attention mass from the first remainder token on.
        """
        block = self._config.block_size
        count = max(0, stop - self._remainder_start - self._config.n_local) // block
        if not self._initial_complete or count == 0:
            return
        tokens = count * block
        heads = mass.shape[0]
        best = mass[:, :tokens].reshape(heads, count, block).topk(self._config.repr_topk, dim=2).indices
        keys = self._blocks(self._keys.rows, self._remainder_start, count)
        keys = keys.repeat_interleave(heads // keys.shape[0], dim=0)
        picked = keys.gather(2, best[..., None].expand(-1, -1, -1, keys.shape[3]))
        self._summaries.extend(picked.mean(dim=2).transpose(0, 1).reshape(1, count, -1))
        self._remainder_start += tokens


class PublishedWindow(LayerMemory):
    """Initial tokens and local window only, as in the published baselines (policies streaming and lm-infinite).

    Tokens in between are dropped. Queries see initial tokens outside their window at one angle: streaming at
    n_init + n_local - 1 with initial keys at 0, 1, ...; lm-infinite at n_local - 1 with all initial keys at 0.
    Cutting into calls or pieces has no influence on the result.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation, query_span: tuple[int, int] | None = None) -> None:
        """Create the memory of one layer; `query_span` is accepted and ignored, as in the published code.

        Raises:
            InvalidConfigError: The policy is not a pure window.
        """
        if config.policy not in ("streaming", "lm-infinite"):
            raise InvalidConfigError(f"PublishedWindow has no policy {config.policy!r}; use PublishedMemory.")
        self.n_seen = 0
        self._config = config
        self._rotation = rotation
        # initial keys, initial values, recent keys, recent values
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Take in the n tokens of one forward call; see the base class.

        Raises:
            InvalidRequestError: More initial tokens than tokens: the published streaming code would fail here.
            UnsupportedModelError: Soft caps or sinks, which the published code does not know.
        """
        _refuse_unknown(scoring)
        n_init, n_local = self._config.n_init, self._config.n_local
        heads, n, _ = query.shape
        begin, end = self.n_seen, self.n_seen + n
        streaming = self._config.policy == "streaming"
        if streaming and n_local < end < n_init:
            raise InvalidRequestError(
                f"The published streaming code fails where n_init={n_init} exceeds the {end} tokens read and these "
                f"exceed n_local={n_local}. Lower n_init, raise n_local or use faithful=False."
            )
        if self._kept is None:
            first_keys, first_values, keys, values = key[:, :n_init], value[:, :n_init], key, value
        else:
            first_keys, first_values = (
                torch.cat((old, new[:, : n_init - old.shape[1]]), dim=1)
                for old, new in zip(self._kept[:2], (key, value), strict=True)
            )
            keys, values = (torch.cat((old, new), dim=1) for old, new in zip(self._kept[2:], (key, value), strict=True))
        offset = end - keys.shape[1]
        far = self._rotation.rotate_all(query, n_local - 1 + (n_init if streaming else 0))
        far_keys = self._rotation.rotate(first_keys, 0) if streaming else first_keys
        output = query.new_empty(n, heads, value.shape[2])
        for start in range(begin, end, self._config.exec_block_size):
            stop = min(start + self._config.exec_block_size, end)
            piece = slice(start - begin, stop - begin)
            local_start = max(0, start - n_local)
            local = slice(local_start - offset, stop - offset)
            distance = distances(start, stop, local_start, stop, query.device)
            output[piece], weights = attend_jointly(
                Segment(
                    self._rotation.rotate(query[:, piece], start - local_start),
                    self._rotation.rotate(keys[:, local], 0),
                    values[:, local],
                    (distance >= 0) & (distance < n_local),
                ),
                Segment(
                    far[:, piece],
                    far_keys,
                    first_values,
                    distances(start, stop, 0, far_keys.shape[1], query.device) >= n_local,
                ),
                scoring.scale,
            )
            if self.on_weights is not None and n == 1:
                everything = torch.arange(stop, device=query.device)
                positions = torch.cat((everything[local_start:], everything[: far_keys.shape[1]]))
                self.on_weights(*_by_group(weights, positions, key.shape[0]))
        recent = (keys[:, -n_local:].clone(), values[:, -n_local:].clone())
        self._kept = (first_keys.clone(), first_values.clone(), *recent)
        self.n_seen = end
        return output

    def set_query(self, start: int, end: int) -> None:
        """Without effect: these policies look nothing up."""

    def fork(self) -> Self:
        """An independent continuation; shares the kept tokens, which are never written in place."""
        other = type(self)(self._config, self._rotation)
        other.n_seen, other._kept = self.n_seen, self._kept
        return other

    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return sum(x.nbytes for x in self._kept or ())


def _refuse_unknown(scoring: Scoring) -> None:
    if scoring.softcap is not None or scoring.sinks is not None:
        raise UnsupportedModelError(
            "faithful=True reproduces code that knows neither attention soft caps nor sinks; use faithful=False."
        )


def _by_group(weights: torch.Tensor, positions: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [heads, 1, m] summed over the heads of each group, and their positions [m], both as [groups, m]."""
    return weights.view(groups, -1, weights.shape[2]).sum(dim=1), positions.expand(groups, -1)
