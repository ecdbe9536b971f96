"""`python -m benchmarks.gpu`: short tables on the terminal, everything as JSON."""

from __future__ import annotations

import functools
import json
import platform
import time
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


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results/gpu.json"),
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Small sizes: shows that it runs, measures nothing.")] = False,
) -> None:
    """Measure kernels and models on one device."""
    began = time.monotonic()
    where = torch.device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "dtype": str(dtype), "tiny": tiny, **_hardware(where)}
    print(report)

    def save() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")

    report["ceilings"] = ceilings(where, dtype, tiny=tiny)
    _table("Ceilings", {"measured": report["ceilings"]})
    for shape in operations.SHAPES:
        errors: dict[str, dict[str, Any]] = {}
        speeds: dict[str, dict[str, Any]] = {}
        for kind in (operations.Operations, ChoiceOperations, MemoryOperations):
            work = kind(operations.tiny(shape) if tiny else shape, where, dtype)
            with torch.inference_mode():
                errors |= work.errors()
                speeds |= work.speeds()
            del work
        report.setdefault("operations", {})[shape.name] = {"errors": errors, "speeds": speeds}
        _table(f"{shape.name}: error against double precision", errors)
        _table(f"{shape.name}: speed", speeds)
        save()
    for name, lengths in LENGTHS.items():
        rows: dict[str, dict[str, Any]] = {}
        model = models.build(name, where, dtype, tiny=tiny)
        kinds = (
            ("qllm", models.with_memory, lengths),
            ("sdpa", models.with_sdpa, SDPA_LENGTHS),
            ("offloaded", models.offloaded, OFFLOAD_LENGTHS),
            ("offloaded_fp8", functools.partial(models.offloaded, offload_dtype="fp8"), OFFLOAD_LENGTHS),
        )
        agreement = models.agreement(model, 300 if tiny else AGREEMENT_LENGTH)
        report.setdefault("agreement", {})[name] = agreement
        _table(f"{name}: steps against the torch functions, other ways of a step against its launches", agreement)
        save()
        reading = 0.0  # seconds per token
        for served, measure, wanted in kinds:
            pace = 0.0 if served == "sdpa" else reading
            measure(model, 300 if tiny else 8_192)  # compiles kernels
            for length in (300, 700) if tiny else wanted:
                left = BUDGET_S - (time.monotonic() - began)
                if pace * length > left:
                    rows[f"{served}@{length}"] = {"failed": f"left out: {left:.0f} s of {BUDGET_S} s left"}
                    continue
                row = rows[f"{served}@{length}"] = measure(model, length)
                pace = row.get("prefill_s", 0.0) / length
                reading = pace if served == "qllm" else reading
        report.setdefault("models", {})[name] = rows
        _table(name, rows)
        del model
        save()
    print(f"\n{time.monotonic() - began:.0f} s; {output}")
    checked = {shape: found["errors"] for shape, found in report["operations"].items()} | report["agreement"]
    wrong = [f"{what} {name}" for what, rows in checked.items() for name, row in rows.items() if not row["ok"]]
    if wrong:
        print("Wrong results: " + "; ".join(wrong))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
