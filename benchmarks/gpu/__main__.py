"""`python -m benchmarks.gpu`: short tables on the terminal, everything as JSON."""

from __future__ import annotations

import functools
import json
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from benchmarks.gpu import models, operations
from benchmarks.gpu.choice_operations import ChoiceOperations
from benchmarks.gpu.memory_operations import MemoryOperations
from benchmarks.gpu.timing import ceilings
from qllm_kernels import dispatch

LENGTHS = {"Llama-3-8B": (8_192, 100_000, 400_000), "Qwen2.5-1.5B": (8_192, 100_000, 1_000_000)}
SDPA_LENGTHS = (8_192, 100_000)
OFFLOAD_LENGTHS = (100_000,)
AGREEMENT_LENGTH = 12_000
BUDGET_S = 540
#: Parts of a run, a process each: what a kernel does to one of them the others do not see.
PARTS = ("operations", *LENGTHS)


def _hardware(device: torch.device) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    name: str = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "cuda": torch.version.cuda, "versions": versions, "kernels": dispatch.backend(device)}


def _table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(f"  {name:36} " + "   ".join(cells), flush=True)


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none: what fails on a device that nobody has seen yet must not take the others with it."""
    try:
        with torch.inference_mode():
            return measure()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0], "ok": False}


class Report:
    """Everything measured so far, in a file that is written after every row.

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


def measure_operations(report: Report, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> None:
    """Every operation in both shapes: its error and its speed."""
    report.add(attempt(lambda: ceilings(device, dtype, tiny=tiny)), "ceilings")
    _table("Ceilings", {"measured": report.content["ceilings"]})
    for shape in operations.SHAPES:
        for kind in (operations.Operations, ChoiceOperations, MemoryOperations):
            work = kind(operations.tiny(shape) if tiny else shape, device, dtype)
            for what, rows in (("errors", work.errors()), ("speeds", work.speeds())):
                for name, measure in rows.items():
                    report.add(attempt(measure), "operations", shape.name, what, name)
        found = report.content["operations"][shape.name]
        _table(f"{shape.name}: error against double precision", found["errors"])
        _table(f"{shape.name}: speed", found["speeds"])


def measure_model(report: Report, name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> None:
    """A model's steps by every way of computing them, then how fast it reads and writes."""
    model = models.build(name, device, dtype, tiny=tiny)
    for way, row in models.agreement(model, 300 if tiny else AGREEMENT_LENGTH):
        report.add(row, "agreement", name, way)
    _table(
        f"{name}: steps against the torch functions, other ways of a step against its launches",
        report.content["agreement"][name],
    )
    kinds = (
        ("qllm", models.with_memory, LENGTHS[name]),
        ("sdpa", models.with_sdpa, SDPA_LENGTHS),
        ("offloaded", models.offloaded, OFFLOAD_LENGTHS),
        ("offloaded_fp8", functools.partial(models.offloaded, offload_dtype="fp8"), OFFLOAD_LENGTHS),
    )
    reading = 0.0  # seconds per token
    for served, measure, wanted in kinds:
        pace = 0.0 if served == "sdpa" else reading
        attempt(functools.partial(measure, model, 300 if tiny else 8_192))  # compiles kernels
        for length in (300, 700) if tiny else wanted:
            row: dict[str, Any] = {"failed": f"left out: {report.left:.0f} s of {BUDGET_S} s left"}
            if pace * length <= report.left:
                row = attempt(functools.partial(measure, model, length))
                pace = row.get("prefill_s", 0.0) / length
                reading = pace if served == "qllm" else reading
            report.add(row, "models", name, f"{served}@{length}")
    _table(name, report.content["models"][name])


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results/gpu.json"),
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Small sizes: shows that it runs, measures nothing.")] = False,
    only: Annotated[str, typer.Option(help=f"One part: {', '.join(PARTS)}.")] = "",
    began: Annotated[float, typer.Option(help="When the run began, in seconds since 1970; 0: now.")] = 0.0,
) -> None:
    """Measure kernels and models on one device."""
    if only and only not in PARTS:
        raise typer.BadParameter(f"{only!r} is none of {', '.join(PARTS)}")
    where = torch.device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    report = Report(output, began or time.time())
    report.content |= {"date": time.strftime("%Y-%m-%d"), "dtype": str(dtype), "tiny": tiny, **_hardware(where)}
    report.save()
    for part in [only] if only else PARTS:
        if part == "operations":
            print({name: report.content[name] for name in ("date", "device", "versions", "kernels", "dtype")})
            measure_operations(report, where, dtype, tiny=tiny)
        else:
            measure_model(report, part, where, dtype, tiny=tiny)
    print(f"\n{BUDGET_S - report.left:.0f} s; {output}")
    if report.wrong():
        print("Failed or wrong: " + "; ".join(report.wrong()))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
