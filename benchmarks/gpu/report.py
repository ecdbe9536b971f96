"""Rows of measurements: each by itself, in a file that is written after every one."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.gpu import timing

BUDGET_S = 540
#: Exit status of a process whose device answers no more; one that begins anew goes on after the row that did it.
BROKEN = 3
_INTERRUPTED = {"failed": "the process ended while this was measured", "ok": False}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none: what fails on a device that nobody has seen yet must not take the others with it."""
    try:
        with torch.inference_mode():
            return measure()
    except Exception as error:
        traceback.print_exc()
        return _failure(error)


def _failure(error: Exception) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {error}".splitlines()[0], "ok": False}


class Report:
    """Everything measured so far.

    Args:
        path: The file; what it holds of the run that began at `began` is kept.
        began: When the run began, in seconds since 1970; its parts are processes of their own.
    """

    def __init__(self, path: Path, began: float) -> None:
        self._path, self._began = path, began
        self.content: dict[str, Any] = {"began": began}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.content = found if found.get("began") == began else self.content

    @property
    def left(self) -> float:
        """Seconds left of the run."""
        return BUDGET_S - (time.time() - self._began)

    def measure(self, measure: Callable[[], dict[str, Any]], device: torch.device, *names: str) -> dict[str, Any]:
        """The row below these names, measured unless it is there already.

        Raises:
            typer.Exit: The device answers no more.
        """
        found = self._found(*names)
        if found is not None:
            return found
        self.add(_INTERRUPTED, *names)
        row = attempt(measure)
        ceiling = self.content.get("ceilings", {}).get(row.get("of"))
        self.add(row | ({"share": row.get("gb_s", row.get("tflop_s")) / ceiling} if ceiling else {}), *names)
        try:
            timing.synchronize(device)
        except Exception as error:
            self.add(row | _failure(error), *names)
            print(f"{device} answers no more after {', '.join(names)}: {error}", flush=True)
            raise typer.Exit(BROKEN) from error
        return row

    def _found(self, *names: str) -> dict[str, Any] | None:
        place: dict[str, Any] | None = self.content
        for name in names:
            place = place.get(name) if place is not None else None
        return place

    def add(self, row: dict[str, Any], *names: str) -> None:
        """Put a row below these names."""
        place = self.content
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = row
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def wrong(self) -> list[str]:
        """Rows that failed, or whose results are wrong."""
        checked: dict[str, dict[str, Any]] = dict(self.content.get("agreement", {}))
        for shape, found in self.content.get("operations", {}).items():
            checked |= {f"{shape} {kind}": rows for kind, rows in found.items()}
        checked |= self.content.get("models", {})
        return [
            f"{what} {name}" for what, rows in checked.items() for name, row in rows.items() if not row.get("ok", True)
        ]
