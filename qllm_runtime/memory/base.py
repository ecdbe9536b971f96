"""What the attention of one layer sees of one sequence: the contract every memory policy fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.memory.record import LookupHook

if TYPE_CHECKING:
    import torch

WeightsHook = Callable[["torch.Tensor", "torch.Tensor"], None]
#: What was read, as tensors by name.
State = dict[str, "torch.Tensor"]


class Tables(NamedTuple):
    """What `qllm_kernels.rotary` rotates by.

    Attributes:
        cos, sin: [n, rotary_dim] fp32, a row per position.
        interleaved: Pairs are neighbours; otherwise half the dimensions apart.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


class Rotation(ABC):
    """The rotary position embedding of one layer, applied by the architecture's own function.

    Attributes:
        original_max_position_embeddings: Longest run of positions that keeps the frequencies of short texts; None where
            frequencies do not depend on the length of the text.
    """

    original_max_position_embeddings: int | None = None

    @abstractmethod
    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate `x` [heads, n, head_dim] to positions start, start + 1, ..., start + n - 1."""

    @abstractmethod
    def rotate_pair(self, a: torch.Tensor, b: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`rotate` for two tensors of the same n (queries and keys of the same tokens)."""

    @abstractmethod
    def rotate_all(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotate every row of `x` [heads, n, head_dim] to the same `position`."""

    def tables(self, n: int, device: torch.device) -> Tables | None:
        """Tables of at least the positions below `n`; None where pairs of dimensions and fixed angles do not tell all."""
        return None


class Scoring(NamedTuple):
    """How one attention module turns dot products into weights.

    Attributes:
        scale: Factor on the logits (1/sqrt(head_dim) in most models).
        softcap: Cap c of c * tanh(logit / c) on the scaled logits, or None.
        sinks: [heads] extra logits that take part in the softmax and carry no value, or None.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class GraphStep(NamedTuple):
    """A single token's step that can be captured in a CUDA graph: from one token to the next only numbers change.

    Attributes:
        reads: What the step reads but does not make; a recorded step may be run again while these are the same objects.
        numbers: What the next token's step reads on the device, see `LayerMemory.numbers`.
    """

    reads: tuple[object, ...]
    numbers: tuple[int, ...]


class LayerMemory(ABC):
    """Keys and values of one layer and one sequence. Keys arrive and are kept un-rotated.

    Attributes:
        n_seen: Tokens appended so far; the absolute index of the next one.
        on_lookup: Called with the record of every lookup, or None.
        on_weights: Called for every single-token step with its attention weights [kv_heads, m], summed over the heads that
            share a kv head, and the absolute indices [kv_heads, m] of the keys they belong to; or None.
        numbers: Where single tokens find the numbers of `GraphStep` on the device, [len(numbers), 1] int64 whose rows lie
            16 bytes apart. While it is set, `append` counts nothing; who set it calls `prepare_step` before and `count` after.
    """

    n_seen: int = 0
    numbers: torch.Tensor | None = None
    on_lookup: LookupHook | None = None
    on_weights: WeightsHook | None = None

    @abstractmethod
    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Append n tokens and return their attention output.

        Args:
            query: [heads, n, head_dim], un-rotated.
            key: [kv_heads, n, head_dim], un-rotated.
            value: [kv_heads, n, head_dim].
            scoring: Scale, soft cap and sinks of the module.

        Returns:
            [n, heads, head_dim].
        """

    @abstractmethod
    def set_query(self, start: int, end: int) -> None:
        """Route tokens [start, end) (absolute indices, not yet appended) to the lookup.

        A question takes effect once its last token was read and replaces the one before; several must be announced in order.
        """

    def cut_pieces(self, positions: Sequence[int]) -> None:
        """Begin new pieces at these tokens (absolute indices, not yet appended): documents end there."""
        return

    def prepare_step(self) -> GraphStep | None:
        """Do everything that precedes a single token, and say what its step takes; None: it cannot run on numbers alone."""
        return None

    def count(self) -> None:
        """One more token was taken in, by a step that ran on `numbers`."""
        raise NotImplementedError

    def question_scores(self) -> torch.Tensor | None:
        """What the question alone says of every block that left the window (eq. 5), [blocks]; None where nothing asks them."""
        return None

    def state(self) -> State:
        """All that was read, on the host, for `restore`; questions are not part of it.

        Raises:
            InvalidRequestError: Memories of this kind are not kept.
        """
        raise InvalidRequestError(
            "Readings in faithful mode are not saved: it is for comparison. Read the documents with faithful=False."
        )

    def restore(self, state: State, device: torch.device) -> None:
        """Take in on `device` what `state` of a memory with this layout returned; nothing was appended yet."""
        raise NotImplementedError

    @abstractmethod
    def fork(self) -> Self:
        """An independent continuation that shares what has been read."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys, values and summaries held on the device (shared parts counted once per fork)."""
