"""A bar in tokens on standard error, for frameworks that have none of their own."""

from __future__ import annotations

from typing import Any

from qllm_runtime.types import Progress


def reading_bar() -> Progress:
    """Shows how far a reading is; begins anew when one is complete."""
    from tqdm.auto import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="Reading", unit=" tokens", unit_scale=True, leave=False)
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return show
