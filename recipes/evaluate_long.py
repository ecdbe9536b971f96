"""The long-context table: exact match per checkpoint, policy, way of reading and length, through the engine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllm_bench.questions.data import Prose, is_exact, make_case
from qllm_bench.scores import CHARS_PER_TOKEN, Score
from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM

FAMILIES = ("passkey", "magic", "attribute", "kv", "place", "job", "code", "relation")
# (tokens, questions, policies)
PLAN = (
    (1_024, 48, ("qllm", "infllm", "streaming", "full")),
    (4_096, 48, ("qllm", "infllm", "streaming")),
    (16_384, 48, ("qllm", "infllm", "streaming")),
    (65_536, 16, ("qllm", "infllm", "streaming")),
    (262_144, 8, ("qllm",)),
    (1_048_576, 4, ("qllm",)),
)
MEMORY = {"n_init": 32, "n_local": 256, "block_size": 32, "topk": 16, "exec_block_size": 128}


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    model: str
    policy: str
    mode: str
    tokens: int
    questions: int

    @property
    def key(self) -> str:
        """Name in the report."""
        return f"{self.model} {self.policy} {self.mode} {self.tokens}"


def cells(models: Sequence[str], longest: int, modes: Sequence[str]) -> Iterator[Cell]:
    """Cells of the plan, short ones first."""
    for tokens, questions, policies in PLAN:
        for model in models:
            for policy in policies:
                for mode in modes:
                    if tokens <= longest:
                        yield Cell(model, policy, mode, tokens, questions)


def run(folders: Sequence[Path], prose: Sequence[Prose], out: Path, longest: int, modes: Sequence[str]) -> None:
    """Fill the table, going on where an earlier run stopped.

    Args:
        folders: Folders of the checkpoints.
        prose: Held-out prose.
        out: JSON report, rewritten after every question.
        longest: Longest document, in tokens.
        modes: ``query_aware``, ``read_once`` or both.
    """
    report: dict[str, Any] = (
        json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"memory": MEMORY, "cells": {}}
    )
    by_name = {f.name: f for f in folders}
    for cell in cells(list(by_name), longest, modes):
        rows: list[dict[str, Any]] = report["cells"].setdefault(cell.key, {"rows": []})["rows"]
        if len(rows) >= cell.questions:
            continue
        memory = MemoryConfig(policy=cell.policy, **MEMORY)
        llm = QLLM.from_pretrained(str(by_name[cell.model]), memory=memory)
        for n in range(len(rows), cell.questions):
            rng = random.Random(f"long-{cell.tokens}-{n}")
            family = FAMILIES[n % len(FAMILIES)]
            chars = int((cell.tokens - 150) * CHARS_PER_TOKEN)
            case = make_case(rng, rng.choice(prose), chars, family, 3, one_template=n % 2 == 0)
            answer = llm.ask(case.question, case.document, mode=cell.mode, max_tokens=96)  # type: ignore[arg-type]
            right = is_exact(answer.text, case.answer, case.values)
            rows.append({"family": family, "right": right, "expected": case.answer, "got": answer.text})
            score = Score(sum(r["right"] for r in rows), len(rows))
            report["cells"][cell.key]["score"] = score.to_json()
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        llm.close()
        print(cell.key, report["cells"][cell.key]["score"], flush=True)
