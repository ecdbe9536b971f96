"""`python -m benchmarks.gpu`: short tables on the terminal, everything as JSON."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from benchmarks.gpu import models, operations, timing
from benchmarks.gpu.choice_operations import ChoiceOperations
from benchmarks.gpu.memory_operations import MemoryOperations
from benchmarks.gpu.report import BUDGET_S, Report
from qllm_kernels import dispatch

LENGTHS = {"Llama-3-8B": (8_192, 100_000, 400_000), "Qwen2.5-1.5B": (8_192, 100_000, 1_000_000)}
SDPA_LENGTHS = (8_192, 100_000)
OFFLOAD_LENGTHS = (100_000,)
AGREEMENT_LENGTH = 12_000
KINDS = {"attention": operations.Operations, "choice": ChoiceOperations, "memory": MemoryOperations}
OPERATIONS = {f"{kind}:{shape.name}": (kind, shape) for shape in operations.SHAPES for kind in KINDS}
#: Parts of a run, a process each: what a kernel does to one of them the others do not see.
PARTS = ("ceilings", *OPERATIONS, *LENGTHS)
RESULTS = Path(os.environ.get("OUT", "benchmarks/results"))
#: Exit status where nothing can be measured.
UNABLE = 2


def missing_for_triton() -> str | None:
    """What Triton needs to compile what launches its kernels, if the machine has none of it."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles what launches its kernels, and there is no gcc or clang: install one or set CC."
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return (
            f"Triton compiles what launches its kernels, and there is no {header}: install the headers of this Python."
        )
    return None


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


def measure_ceilings(report: Report, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> None:
    """What the device reaches at its best."""
    print({name: report.content[name] for name in ("date", "device", "versions", "kernels", "dtype")})
    report.measure(functools.partial(timing.ceilings, device, dtype, tiny=tiny), device, "ceilings")
    _table("Ceilings", {"measured": report.content["ceilings"]})


def measure_operations(report: Report, part: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> None:
    """Operations of one kind in one shape: their errors and their speed."""
    kind, shape = OPERATIONS[part]
    work = KINDS[kind](operations.tiny(shape) if tiny else shape, device, dtype)
    for what, rows in (("errors", work.errors()), ("speeds", work.speeds())):
        for name, measure in rows.items():
            report.measure(measure, device, "operations", shape.name, what, name)
        found = report.content["operations"][shape.name][what]
        _table(f"{shape.name}: {what}", {name: found[name] for name in rows})


def measure_model(
    report: Report, name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool, short: bool
) -> None:
    """A model's steps by every way of computing them, then how fast it reads and writes."""
    model = models.build(name, device, dtype, tiny=tiny)
    for way, compare in models.Agreement(model, 300 if tiny else AGREEMENT_LENGTH).rows().items():
        report.measure(compare, device, "agreement", name, way)
    _table(
        f"{name}: steps against the torch functions, other ways of a step against its launches",
        report.content["agreement"][name],
    )
    kinds = (
        ("qllm", functools.partial(models.warmed, models.with_memory), LENGTHS[name]),
        ("sdpa", functools.partial(models.warmed, models.with_sdpa), SDPA_LENGTHS),
        ("offloaded", models.offloaded, OFFLOAD_LENGTHS),
        ("offloaded_fp8", functools.partial(models.offloaded, offload_dtype="fp8"), OFFLOAD_LENGTHS),
    )
    reading = 0.0  # seconds per token
    for served, measure, wanted in kinds:
        pace = 0.0 if served == "sdpa" else reading
        for length in (300, 700) if tiny else wanted:
            if short:
                length = models.warm_up_length(model, length)
            place = "models", name, f"{served}@{length}"
            if pace * length > report.left:
                report.add({"failed": f"left out: {report.left:.0f} s of {BUDGET_S} s left"}, *place)
                continue
            row = report.measure(functools.partial(measure, model, length), device, *place)
            pace = row.get("prefill_s", 0.0) / length
            reading = pace if served == "qllm" else reading
    _table(name, report.content["models"][name])


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "gpu.json",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Small sizes: shows that it runs, measures nothing.")] = False,
    short: Annotated[bool, typer.Option(help="Short texts: compiles what longer ones run, ahead of a run.")] = False,
    only: Annotated[str, typer.Option(help=f"One part: {', '.join(PARTS)}.")] = "",
    began: Annotated[float, typer.Option(help="When the run began, in seconds since 1970; 0: now.")] = 0.0,
) -> None:
    """Measure kernels and models on one device."""
    if only and only not in PARTS:
        raise typer.BadParameter(f"{only!r} is none of {', '.join(PARTS)}")
    where = torch.device(device)
    missing = missing_for_triton() if where.type == "cuda" else None
    if missing:
        typer.echo(missing, err=True)
        raise typer.Exit(UNABLE)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    report = Report(output, began or time.time())
    report.content |= {"date": time.strftime("%Y-%m-%d"), "dtype": str(dtype), "tiny": tiny, **_hardware(where)}
    report.save()
    for part in [only] if only else PARTS:
        if part == "ceilings":
            measure_ceilings(report, where, dtype, tiny=tiny)
        elif part in OPERATIONS:
            measure_operations(report, part, where, dtype, tiny=tiny)
        else:
            measure_model(report, part, where, dtype, tiny=tiny, short=short)
    print(f"\n{BUDGET_S - report.left:.0f} s; {output}")
    if report.wrong():
        print("Failed or wrong: " + "; ".join(report.wrong()))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
