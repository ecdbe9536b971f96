"""`qllm bench speed`: reading, writing, a second question and memory, against stock attention in the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from qllm_bench import figures, tables
from qllm_bench.arguments import short
from qllm_bench.environment import environment
from qllm_bench.harness import Job, Label, run
from qllm_bench.journal import Journal
from qllm_bench.speed_measure import SHAPES, Measurement, memory_for, trained_length
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError, QLLMError, UnsupportedModelError
from qllm_runtime.loading import locate
from qllm_runtime.support import check_support
from qllm_runtime.types import Progress

STOCK = "sdpa"
_DTYPES = ("auto", "float32", "float16", "bfloat16")
#: column -> (title, what a ratio to stock attention divides)
COLUMNS = {
    "prefill_s": "prefill, s",
    "decode_ms": "decode, ms per token",
    "second_ms": "second question, ms",
    "peak_mib": "peak memory, MiB",
    "held_mib": "keys and values, MiB",
}


class MeasurementError(QLLMError):
    """The process of a measurement failed."""


def resolve(name: str, device: str, dtype: str) -> tuple[str, MemoryConfig]:
    """The device that is meant, and the memory settings a model is measured with unless others are given.

    Raises:
        InvalidConfigError: Unknown device or dtype.
        ModelNotFoundError: No such model.
        UnsupportedModelError: A model that the engine can't serve.
    """
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind, _, number = place.partition(":")
    count = torch.cuda.device_count()
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise InvalidConfigError(f"Unknown device {device!r}; use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= count:
        raise InvalidConfigError(
            f"device={device!r}, but this machine has {count} usable CUDA devices; use auto or cpu."
        )
    if dtype not in _DTYPES:
        raise InvalidConfigError(f"Unknown dtype {dtype!r}; use {', '.join(_DTYPES)}.")
    if name in SHAPES:
        return place, memory_for(name, int(SHAPES[name]["max_position_embeddings"]))
    where = locate(name)
    support = check_support(where)
    if not support.ok:
        raise UnsupportedModelError(f"{name!r}: {support.reason}")
    return place, memory_for(name, trained_length(AutoConfig.from_pretrained(where)))


def policy_memory(base: MemoryConfig, policy: str) -> MemoryConfig:
    """Settings of a policy; those without lookups see as many tokens as the others in all."""
    if policy in ("streaming", "lm-infinite"):
        return base.replace(policy=policy, n_local=base.window)
    return base.replace(policy="full" if policy == STOCK else policy)


def bench(
    name: str,
    lengths: Sequence[int],
    policies: Sequence[str],
    base: MemoryConfig,
    *,
    device: str,
    dtype: str,
    steps: int,
    threads: int,
    repeats: int,
    stock_up_to: int,
    out: Path,
) -> Journal:
    """Measure every policy at every length, each in a process of its own; writes ``speed.*`` to ``out``.

    Args:
        name: Model; see `speed_measure.SHAPES`.
        lengths: Tokens read.
        policies: Policies of the engine, and "sdpa" for stock transformers.
        base: Memory settings that policies are derived from.
        device, dtype: As in `QLLM.from_pretrained`.
        steps: Decode steps; the median counts.
        threads: CPU threads.
        repeats: Measurements of each kind; the median counts.
        stock_up_to: Longest text for dense attention, whose reading takes time quadratic in it.
        out: Folder.
    """
    hardware = {**environment(device)["hardware"], "threads": threads}
    subject = {"model": name, "device": device, "dtype": dtype, "steps": steps, "hardware": hardware}
    jobs = []
    for repeat in range(repeats):
        for length in lengths:
            for policy in policies:
                if policy in (STOCK, "full") and length > stock_up_to:
                    continue
                memory = policy_memory(base, policy).model_dump()
                asked = Measurement(policy, length, name, device, dtype, memory, steps, threads)
                labels: dict[str, Label] = {"policy": policy, "tokens": length, "repeat": repeat}
                jobs.append(Job(f"{policy}/{length}/{repeat}", labels, length, partial(_measure, asked)))
    if not jobs:
        raise InvalidRequestError(
            f"All --lengths are beyond the {short(stock_up_to)} tokens of --sdpa-up-to, so nothing would be measured; raise it "
            "or add a policy."
        )
    journal = Journal(out, "speed", {**subject, "memory": base.model_dump()})
    journal.begin({"lengths": lengths, "policies": policies, "repeats": repeats}, device)
    run(journal, jobs)
    report(journal)
    return journal


def _measure(asked: Measurement, progress: Progress) -> dict[str, Any]:
    command = [sys.executable, "-m", "qllm_bench.speed_measure", json.dumps(asdict(asked))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode in (-9, 137):  # the system's out-of-memory killer
            return {"failed": "out of memory"}
        raise MeasurementError(f"Measuring {asked.policy} at {asked.length} tokens failed: {last}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over repeats by length and policy, with ratios to stock attention and growth from the shortest length.

    ``ratio``: how many times as fast (or as small) as stock attention at the same length. ``growth``: reading time divided by
    that of the policy's shortest length; ``longer``: the same of the lengths.
    """
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["tokens"], row["policy"]), []).append(row)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for (tokens, policy), group in sorted(groups.items(), key=lambda item: item[0][0]):
        good = [row for row in group if "failed" not in row]
        medians = {c: round(statistics.median(row[c] for row in good), 4) for c in COLUMNS} if good else {}
        first = next((cell for (_, p), cell in found.items() if p == policy and "prefill_s" in cell), None)
        cell: dict[str, Any] = {"tokens": tokens, "policy": policy, "repeats": len(group), **medians}
        if not good:
            cell["failed"] = group[0]["failed"]
        elif first is not None:
            cell["longer"] = round(tokens / first["tokens"], 2)
            cell["growth"] = round(cell["prefill_s"] / first["prefill_s"], 2)
        found[tokens, policy] = cell
    for (tokens, policy), cell in found.items():
        stock = found.get((tokens, STOCK), {})
        if policy != STOCK and "prefill_s" in stock and "prefill_s" in cell:
            cell["ratio"] = {column: round(stock[column] / cell[column], 2) for column in COLUMNS}
    return list(found.values())


def report(journal: Journal) -> str:
    """Write JSON, Markdown and a figure of what the journal holds; returns the Markdown."""
    found = summarise(journal.rows)
    journal.report(cells=found)
    header = ["tokens", "policy", *COLUMNS.values(), "tokens/s read", "growth of prefill"]
    body = []
    for cell in found:
        line = [short(cell["tokens"]), cell["policy"]]
        if "failed" in cell:
            body.append([*line, cell["failed"], *["-"] * (len(header) - 3)])
            continue
        for column in COLUMNS:
            ratio = f" ({cell['ratio'][column]:.1f}x)" if "ratio" in cell else ""
            line.append(f"{cell[column]:,.{2 if column == 'prefill_s' else 1}f}{ratio}")
        line.append(f"{cell['tokens'] / cell['prefill_s']:,.0f}")
        line.append(f"{cell['growth']:.1f} for {cell['longer']:g} times the text" if "growth" in cell else "-")
        body.append(line)
    text = tables.markdown(header, body)
    text += f"\n\nIn brackets: how many times better than {STOCK} at the same length in the same run.\n"
    journal.path.with_suffix(".md").write_text(text, encoding="utf-8")
    good = [cell for cell in found if "failed" not in cell]
    if good:
        figures.costs(journal.path.with_suffix(".png"), good, {k: COLUMNS[k] for k in list(COLUMNS)[:4]})
    return text
