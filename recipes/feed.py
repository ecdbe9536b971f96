"""Batches for the steps of a phase, made in the training process or ahead of it by others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from recipes.batches import Batch, Sampler


@dataclass(frozen=True)
class Plan:
    """What the batch of a step is to be.

    Attributes:
        seed: Seed of everything random in it.
        length: Tokens of a sequence.
        count: Sequences.
        easy: Share of easy samples.
        clamp_share: How often distances are clamped as the lookup does.
        late: Whether to draw more of what is learnt late.
    """

    seed: str
    length: int
    count: int
    easy: float
    clamp_share: float
    late: bool


class Feed(Dataset[tuple[Batch, int | None]]):
    """Batches by their plans, each with the distance that is clamped in it, if any.

    Args:
        sampler: Draws samples.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __getitem__(self, plan: Plan) -> tuple[Batch, int | None]:
        rng = self.sampler.rng
        rng.seed(plan.seed)
        length = plan.length
        clamp = rng.random() < plan.clamp_share and length >= 256
        n_local = int(math.exp(rng.uniform(math.log(length / 8), math.log(length * 0.7)))) if clamp else None
        batch = self.sampler.batch(
            plan.count,
            length,
            0.6 if length >= 256 else 0.3,
            2000 if clamp else 300,
            drop_share=0.5 if clamp else 0.0,
            easy=plan.easy,
            repeat=0.25 if length == 128 else 0.04,
            late=plan.late,
        )
        return batch, n_local


class Plans:
    """The plans of a phase from a step on, without end.

    Args:
        first: The step.
        plan: The plan of a step; asked when its batch is about to be made, which other processes do ahead of time: stages
            change four batches of each process late.
    """

    def __init__(self, first: int, plan: Callable[[int], Plan]) -> None:
        self.first = first
        self.plan = plan

    def __iter__(self) -> Iterator[Plan]:
        step = self.first
        while True:
            yield self.plan(step)
            step += 1


def batches(sampler: Sampler, plans: Plans, processes: int) -> Iterator[tuple[Batch, int | None]]:
    """Batches of all plans, in order.

    Args:
        sampler: Draws samples.
        plans: What they are to be.
        processes: Others that make them; 0: this one does, when they are asked for.
    """
    ahead = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if processes else {}
    loader = DataLoader(
        Feed(sampler), batch_size=None, sampler=plans, num_workers=processes, collate_fn=_as_it_is, **ahead
    )  # type: ignore[arg-type]
    return iter(loader)


def _as_it_is(item: tuple[Batch, int | None]) -> tuple[Batch, int | None]:
    return item
