"""What the kernels have in common: sizes of tiles, the device they run on and what they refuse."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

LARGEST_HEAD = 256
MOST_PIECES = 65535  # of a launch: what a grid takes in its third dimension
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """What tiles depend on.

    Attributes:
        warp_groups: Matrix instructions of four warps together (sm_90, sm_100), which hold larger tiles without spilling.
        shared: Most bytes of shared memory of one program.
    """

    warp_groups: bool
    shared: int


@functools.cache
def target(device: torch.device) -> Target:
    """The target that `device` is; the interpreter is given a large one."""
    if device.type != "cuda":
        return Target(True, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stub lacks it
    return Target(properties.major in (9, 10), shared)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `n` nor below `least`."""
    return max(least, 1 << (n - 1).bit_length())


def refusal(*tensors: torch.Tensor | None) -> str | None:
    """Why no kernel serves these tensors [..., head_dim], or None."""
    given = [x for x in tensors if x is not None]
    for x in given:
        if x.dtype not in _DTYPES:
            return f"dtype {x.dtype} is not float32, float16 or bfloat16"
        if x.shape[-1] > LARGEST_HEAD:
            return f"head size {x.shape[-1]} is above {LARGEST_HEAD}"
        if x.stride(-1) != 1:
            return "head vectors are not contiguous"
    if len({x.dtype for x in given}) > 1:
        return "queries, keys and values differ in dtype"
    return None
