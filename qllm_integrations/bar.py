"""A bar on standard error, for frameworks that have none of their own."""

from __future__ import annotations

from typing import Any

from qllm_runtime.types import Progress


def reading_bar(what: str = "Reading", unit: str = "tokens") -> Progress:
    """Shows how far a reading is; begins anew when one is complete."""
    from tqdm.auto import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=unit == "tokens", leave=False)
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return show
