"""Copies of pages from one place to another by a list on the device, as they are or as fp8 with a scale per page and head."""

from __future__ import annotations

import torch

LARGEST_FP8 = 448.0  # of float8_e4m3fn


def _pairs(moves: torch.Tensor, counts: torch.Tensor, head: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    row = head * moves.shape[0] // heads
    listed = moves[row, : int(counts[row])]
    return listed[:, 0], listed[:, 1]


def copy_pages(source: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor) -> None:
    """Copy listed pages. On a GPU, one of the two may be pinned memory of the host.

    Args:
        source, target: [heads, n_pages, block_size, head_dim], each page contiguous.
        moves: [rows, length, 2] pages of source and target; rows divides heads, and head h goes by row h * rows // heads.
            The targets of a row are distinct.
        counts: [rows], how many of a row's first entries count.
    """
    heads = source.shape[0]
    for head in range(heads):
        origin, destination = _pairs(moves, counts, head, heads)
        page = source[head, origin.to(source.device)]
        target[head, destination.to(target.device)] = page.to(target.device)


def quantise_pages(
    source: torch.Tensor, target: torch.Tensor, scales: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
) -> None:
    """`copy_pages` to float8_e4m3fn; the largest element of each page becomes the largest number of that type.

    Args:
        source, moves, counts: As in `copy_pages`.
        target: [heads, n_pages, block_size, head_dim] float8_e4m3fn.
        scales: [heads, n_pages] fp32, gets what the elements of a target page are to be multiplied with.
    """
    heads = source.shape[0]
    for head in range(heads):
        origin, destination = _pairs(moves, counts, head, heads)
        page = source[head, origin].float()
        largest = page.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny * LARGEST_FP8)
        target[head, destination] = (page * (LARGEST_FP8 / largest)[:, None, None]).to(torch.float8_e4m3fn)
        scales[head, destination] = largest / LARGEST_FP8


def dequantise_pages(
    source: torch.Tensor, scales: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
) -> None:
    """`copy_pages` from float8_e4m3fn pages with `scales` [heads, n_pages] to the dtype of `target`."""
    heads = source.shape[0]
    for head in range(heads):
        origin, destination = _pairs(moves, counts, head, heads)
        page = source[head, origin].float() * scales[head, origin][:, None, None]
        target[head, destination] = page.to(target.dtype)
