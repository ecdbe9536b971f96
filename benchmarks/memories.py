"""Memory settings compared on the reader: exact match on facts hidden in held-out prose.

`python -m benchmarks.memories --text DIR` answers the same questions under every setting, resumes after an interruption and
writes JSON. Facts, names and values come from the evaluation side of `recipes`, the prose from books it never trained on.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer

BASE = {"n_init": 32, "n_local": 256, "block_size": 32, "topk": 16, "exec_block_size": 128}
#: name -> (changes to BASE, mode)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "default, query_aware": ({}, "query_aware"),
    "default, read_once": ({}, "read_once"),
    "faithful, query_aware": ({"faithful": True, "query_weight": 1.0}, "query_aware"),
    "query_weight 0": ({"query_weight": 0.0}, "query_aware"),
    "query_weight 4": ({"query_weight": 4.0}, "query_aware"),
    "summary mean": ({"summary": "mean"}, "query_aware"),
    "summary published": ({"summary": "published"}, "query_aware"),
    "8 representatives": ({"repr_topk": 8}, "query_aware"),
    "16 representatives": ({"repr_topk": 16}, "query_aware"),
    "blocks of 16, topk 32": ({"block_size": 16, "topk": 32}, "query_aware"),
    "blocks of 8, topk 64": ({"block_size": 8, "topk": 64}, "query_aware"),
    "blocks of 16, every key": ({"block_size": 16, "topk": 32, "repr_topk": 16}, "query_aware"),
    "summary every key": ({"repr_topk": 32}, "query_aware"),
    "every key, query_weight 4": ({"repr_topk": 32, "query_weight": 4.0}, "query_aware"),
    "every key, infllm": ({"repr_topk": 32, "policy": "infllm"}, "query_aware"),
    "summary every key, read_once": ({"repr_topk": 32}, "read_once"),
    "per_kv_head": ({"selection": "per_kv_head"}, "query_aware"),
    "infllm": ({"policy": "infllm"}, "query_aware"),
    "streaming": ({"policy": "streaming"}, "query_aware"),
}


def main(
    text: Annotated[Path, typer.Option(help="Folder with the held-out books (.txt).")],
    model: Annotated[str, typer.Option(help="reader, reader-plain or a path.")] = "reader",
    tokens: Annotated[int, typer.Option(help="Length of each document.")] = 4096,
    questions: Annotated[int, typer.Option(help="Questions per setting.")] = 48,
    output: Annotated[Path, typer.Option(help="JSON report.")] = Path("benchmarks/results/memories.json"),
) -> None:
    """Fill the table, setting by setting."""
    from qllm_bench.questions.data import is_exact, make_case
    from qllm_bench.scores import CHARS_PER_TOKEN, Score
    from qllm_runtime import QLLM, MemoryConfig
    from recipes.evaluate import held_out_prose
    from recipes.evaluate_long import FAMILIES

    prose = held_out_prose(text)
    report: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    report |= {"model": model, "tokens": tokens, "base": BASE, "date": time.strftime("%Y-%m-%d")}
    output.parent.mkdir(parents=True, exist_ok=True)
    cells = report.setdefault("settings", {})
    for name, (changes, mode) in SETTINGS.items():
        rows = cells.setdefault(name, {"right": []})["right"]
        llm = QLLM.from_pretrained(model, memory=MemoryConfig(**{**BASE, **changes}))
        for number in range(len(rows), questions):
            rng = random.Random(f"memories-{tokens}-{number}")
            chars, family = int((tokens - 150) * CHARS_PER_TOKEN), FAMILIES[number % len(FAMILIES)]
            case = make_case(rng, rng.choice(prose), chars, family, 2, canonical=True)
            answer = llm.ask(case.question, case.document, mode=mode, max_tokens=64)
            rows.append(is_exact(answer.text, case.answer, case.values))
            cells[name] |= Score(sum(rows), len(rows)).to_json() | {"right": rows}
            output.write_text(json.dumps(report) + "\n")
        print(f"{name:30} {sum(rows):3} of {len(rows)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
