"""Where a single token stands, as numbers of the host and on the device."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch


class Place(NamedTuple):
    """A token about to be taken in.

    Attributes:
        position: Its absolute index.
        slot: Its slot in the window.
        first: Slot of the oldest token it sees there.
        back: Slots before its own that it sees.
        oldest: Absolute index of the token in `first`; 0 while no block has left the window.
        n_blocks: Blocks it may look up.
        n_chosen: Blocks it does look up.
    """

    position: int
    slot: int
    first: int
    back: int
    oldest: int
    n_blocks: int
    n_chosen: int


class DevicePlace(NamedTuple):
    """A `Place` on the device, each number [1] int64. What runs on it can be run again for the tokens that follow."""

    position: torch.Tensor
    slot: torch.Tensor
    first: torch.Tensor
    back: torch.Tensor
    oldest: torch.Tensor
    n_blocks: torch.Tensor
    n_chosen: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Self:
        """The fields that lie in `numbers`, as `step_inputs` makes it."""
        return cls(*numbers.unbind(0))


def step_inputs(places: list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """Numbers of several places on the device, [places, numbers, 1] int64; the host does not wait for it.

    Kernels are compiled anew for addresses of another alignment, so each number has 16 bytes of its own.
    """
    pairs = [[(number, 0) for number in place] for place in places]
    numbers = torch.tensor(pairs, dtype=torch.int64, pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)[..., :1]
