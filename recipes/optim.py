"""Optimiser of the recipe: Muon for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Muon


class Optimizers:
    """Both optimisers under one learning-rate factor."""

    def __init__(self, model: nn.Module, matrix_lr: float = 0.005, other_lr: float = 8e-4) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.peaks = (matrix_lr, other_lr)
        self.muon = Muon(
            matrices, matrix_lr, weight_decay=0.0, momentum=0.95, nesterov=True, ns_steps=4, adjust_lr_fn="original"
        )
        self.adam = AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, factor: float) -> None:
        """Take one step at ``factor`` times the peak learning rates, and clear the gradients."""
        for optimizer, peak in zip((self.muon, self.adam), self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of both optimisers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        # Checkpoints of before Muon was torch's have the momentum under another name, and fewer settings.
        named = {
            n: {"momentum_buffer": values.get("momentum_buffer", values.get("momentum"))}
            for n, values in state["muon"]["state"].items()
        }
        self.muon.load_state_dict({"state": named, "param_groups": self.muon.state_dict()["param_groups"]})
        self.adam.load_state_dict(state["adam"])
