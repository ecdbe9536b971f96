"""Memories whose single tokens run on numbers that the device reads, so that their steps fit into a CUDA graph."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypedDict

import torch

from qllm_kernels.dispatch import backend
from qllm_runtime.memory.base import LayerMemory, Scoring
from qllm_runtime.memory.places import DevicePlace, step_inputs


class StepSpan(TypedDict):
    """What a single token sees of its window, and how dot products become weights, as the kernels take it."""

    slot: torch.Tensor
    back: torch.Tensor
    scale: float
    softcap: float | None


def step_span(place: DevicePlace, scoring: Scoring) -> StepSpan:
    """The span of a token at `place`."""
    return StepSpan(slot=place.first, back=place.back, scale=scoring.scale, softcap=scoring.softcap)


def window_positions(place: DevicePlace, slots: int) -> torch.Tensor:
    """Absolute index [slots] of what each slot holds; of slots that are not filled, that of the token at `place`."""
    indices = torch.arange(slots, device=place.position.device) + (place.position - place.slot)
    return torch.minimum(indices, place.position)


class GraphStepMemory(LayerMemory):
    """A memory that, on Triton, takes in single tokens wherever the device says they are."""

    @abstractmethod
    def step_at(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, place: DevicePlace
    ) -> torch.Tensor:
        """Take in a single token after `prepare_step` and return its attention, [heads, 1, value_dim]; the host counts nothing.

        Args:
            query, key, value, scoring: As in `append`.
            place: Where the token is.
        """

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor | None:
        """`append` of a token that runs on numbers of the device; None where it must run on those of the host."""
        if self.numbers is not None:
            return self.step_at(query, key, value, scoring, DevicePlace.of(self.numbers)).transpose(0, 1)
        if query.shape[1] > 1 or backend(query.device) == "torch":
            return None
        step = self.prepare_step()
        if step is None:
            return None
        place = DevicePlace.of(step_inputs([step.numbers], query.device)[0])
        out = self.step_at(query, key, value, scoring, place)
        self.count()
        return out.transpose(0, 1)
