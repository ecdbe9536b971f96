"""Slabs: room for pages in the host's memory, which keep the dtype of the model or become fp8."""

from __future__ import annotations

import functools

import torch
from typing_extensions import override

from qllm_kernels.dispatch import backend, copy_pages, dequantise_pages, quantise_pages

_TOGETHER = 1024  # pages turned back from fp8 at a time


class Slab:
    """Room for pages, pinned where the device is a GPU; a page holds the keys and values of a head's block in a row.

    Args:
        key, value: Blocks [kv_heads, m, block_size, head_dim or value_dim] like those that it will hold.
        capacity: Pages of each head.

    Attributes:
        data: [capacity, kv_heads, 1, width].
        like: Keys and values [kv_heads, 0, head_dim or value_dim] on the device, in the dtype of the model.
        device_bytes: What it takes on the device.
    """

    device_bytes: int = 0

    def __init__(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> None:
        self._shapes = key.shape, value.shape
        self._dtype, self._device = key.dtype, key.device
        self.like = key.new_empty(len(key), 0, key.shape[3]), value.new_empty(len(value), 0, value.shape[3])
        shape = (capacity, key.shape[0], 1, key[0, 0].numel() + value[0, 0].numel())
        self.data = torch.empty(shape, dtype=self._stored, device="cpu", pin_memory=key.is_cuda)

    @property
    def _stored(self) -> torch.dtype:
        return self._dtype

    def __len__(self) -> int:
        return self.data.shape[0]

    def slots(self, n: int) -> torch.Tensor:
        """Room on the device for `n` pages of each head, in the dtype of the model: [n, kv_heads, 1, width]."""
        return torch.empty(n, *self.data.shape[1:], dtype=self._dtype, device=self._device)

    def split(self, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, n, block_size, head_dim or value_dim] in pages [n, kv_heads, 1, width]."""
        views = [
            part.view(len(joint), -1, *shape[2:]).transpose(0, 1)
            for part, shape in zip(self._parts(joint), self._shapes, strict=True)
        ]
        return views[0], views[1]

    def _parts(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """Pages [n, kv_heads, 1, width] of keys, and of values."""
        border = self._shapes[0][2:].numel()
        return [part[:, :, None] for part in (joint[:, :, 0, :border], joint[:, :, 0, border:])]

    def write(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take in blocks as pages from `first` on."""
        leaving = torch.cat([x.transpose(0, 1).flatten(2) for x in (key, value)], 2)
        to_host(leaving[:, :, None], self.data[first : first + key.shape[1]])

    def fetch(self, slots: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor) -> None:
        """Copy pages to `slots` by a list of moves on the device, as `copy_pages` takes it."""
        copy_pages(self.data.transpose(0, 1), slots.transpose(0, 1), moves, counts)

    def keys(self, first: int, end: int) -> torch.Tensor:
        """Keys [kv_heads, n, block_size, head_dim] of pages first .. end - 1 where they can be compared with a question."""
        found = self.split(self.data[first:end])[0]
        return found if backend(self._device) == "triton" else found.to(self._device)

    def contents(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `n` pages as `write` takes them, on the host; waits for copies under way."""
        self._await_copies()
        return self.split(self.data[:n])

    def _await_copies(self) -> None:
        """Let all that is on its way to the host arrive."""
        if self._device.type == "cuda":
            copying(self._device).synchronize()


class QuantisedSlab(Slab):
    """Pages as float8_e4m3fn, half of what bf16 takes on the host and on the way to the device.

    Keys and values of a page have a scale each, which stays on the device.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> None:
        super().__init__(key, value, capacity)
        self._scales = torch.empty(2, key.shape[0], capacity, device=key.device)
        self.device_bytes = int(self._scales.nbytes)

    @property
    @override
    def _stored(self) -> torch.dtype:
        return torch.float8_e4m3fn

    @override
    def write(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        m = key.shape[1]
        small = torch.empty(m, *self.data.shape[1:], dtype=self._stored, device=key.device)
        for part, blocks, scales in zip(self._parts(small), (key, value), self._scales, strict=True):
            pages = blocks.flatten(2)[:, :, None]
            quantise_pages(pages, part.transpose(0, 1), scales[:, first : first + m], *_each(0, m, key.device))
        to_host(small, self.data[first : first + m])

    @override
    def fetch(self, slots: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor) -> None:
        parts = zip(self._parts(self.data), self._scales, self._parts(slots), strict=True)
        for source, scales, target in parts:
            dequantise_pages(source.transpose(0, 1), scales, target.transpose(0, 1), moves, counts)

    @override
    def keys(self, first: int, end: int) -> torch.Tensor:
        return self._part(0, first, end)

    @override
    def contents(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._await_copies()
        turns = [slice(at, min(at + _TOGETHER, n)) for at in range(0, n, _TOGETHER)]
        key, value = (
            torch.cat([self._part(part, rows.start, rows.stop).cpu() for rows in turns], 1) for part in (0, 1)
        )
        return key, value

    def _part(self, part: int, first: int, end: int) -> torch.Tensor:
        """Keys (0) or values (1) [kv_heads, n, block_size, dim] of pages first .. end - 1 in the dtype of the model."""
        n, small = end - first, self._parts(self.data)[part]
        found = torch.empty(n, *small.shape[1:], dtype=self._dtype, device=self._device)
        moves = _each(first, end, self._device)
        dequantise_pages(small.transpose(0, 1), self._scales[part], found.transpose(0, 1), *moves)
        return found.view(n, -1, *self._shapes[part][2:]).transpose(0, 1)


def _each(first: int, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves of pages first .. end - 1 of every head to the first places, and their number."""
    place = torch.arange(end - first, device=device)
    return torch.stack((place + first, place), -1)[None], torch.full((1,), len(place), dtype=torch.int32, device=device)


@functools.cache
def copying(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to the host beside what the device computes."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_host(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy without making host or device wait."""
    if not source.is_cuda:
        target.copy_(source)
        return
    stream = copying(source.device)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    source.record_stream(stream)
