"""Checkpoints of a run, each with what makes the run the one it is: those of another are refused."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class OtherRunError(Exception):
    """A checkpoint is of a run with other settings; the message names them."""


@dataclass(frozen=True)
class Identity:
    """What makes a run the one it is. Threads and the processes that make batches do not: the data of a step are the same.

    Attributes:
        minutes: Training time of all phases together.
        device: Kind of device, which decides lengths and numbers of sequences.
        text: Digest of the prose.
        seed: Seed of everything random.
        size: Size of the network, by its name.
    """

    minutes: float
    device: str
    text: str
    seed: int
    size: str

    def demand(self, path: Path, found: Mapping[str, Any] | None, free: Sequence[str] = ()) -> None:
        """Refuse a checkpoint of another run.

        Args:
            path: The checkpoint.
            found: Identity of the run that wrote it; None: it does not say.
            free: Settings that may differ.

        Raises:
            OtherRunError: If any other setting differs.
        """
        if found is None:
            tqdm.write(f"{path} does not say which run wrote it; it is taken to be one with the same settings")
            return
        mine = asdict(self)
        other = [name for name in mine if name not in free and found.get(name) != mine[name]]
        if other:
            there, here = (", ".join(f"{name} {x.get(name)}" for name in other) for x in (found, mine))
            raise OtherRunError(
                f"{path} is of another run: {there} there, {here} here. "
                f"Give the {' and '.join(other)} that it was begun with, or another --out."
            )


def digest(books: Mapping[str, str]) -> str:
    """Eight hexadecimal digits that change with the books."""
    total = 0
    for name in sorted(books):
        total = zlib.crc32(f"{name}\0{books[name]}\0".encode(), total)
    return f"{total:08x}"


def read(path: Path, identity: Identity, free: Sequence[str] = ()) -> dict[str, Any]:
    """A checkpoint, all of it on the CPU.

    Args:
        path: The checkpoint.
        identity: The run it has to be of.
        free: Settings in which it may differ.

    Raises:
        OtherRunError: If it is of another run.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    identity.demand(path, state.get("run"), free)
    return state


def write(path: Path, identity: Identity, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, then replace the old one."""
    partial = path.with_suffix(".partial")
    torch.save({**state, "run": asdict(identity)}, partial)
    partial.replace(path)
