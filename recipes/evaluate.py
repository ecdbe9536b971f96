"""Measure a shipped reader on books and facts it was never trained on.

``python -m recipes.evaluate --text DIR`` measures within the window. Longer documents are read through the engine's memory:
``qllm bench needle``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qllm_bench.questions.data import Case, Prose, is_exact, make_case, normalise, read_books, unwrap
from qllm_bench.questions.facts import FAMILIES, WORDED_FAMILIES
from qllm_bench.scores import CHARS_PER_TOKEN, Score
from qllm_runtime.samples import story
from recipes import handwritten
from recipes.tokenizer import THOUGHTS

SETTINGS = (
    ("books", "canonical", "query_aware"),
    ("books", "canonical", "read_once"),
    ("books", "one-template", "query_aware"),
    ("books", "varied", "query_aware"),
    ("stories", "canonical", "query_aware"),
    ("books", "unseen", "query_aware"),
    ("books", "development", "query_aware"),
    ("books", "test", "query_aware"),
)
MODELS = Path(__file__).parent.parent / "qllm_runtime" / "models"


def held_out_prose(folder: Path) -> list[Prose]:
    """The books kept for evaluation, as printed and with their lines joined."""
    books = read_books(folder, held_out=True)
    return [Prose.of(b) for b in books.values()] + [Prose.of(unwrap(b)) for b in books.values()]


def story_prose() -> list[Prose]:
    """Generated stories; needs no books."""
    return [Prose.of("\n\n".join(story(random.Random(f"evaluation-{i}"), 60_000))) for i in range(2)]


def prompt_ids(tokenizer: Any, case: Case, layout: str) -> list[int]:
    """Tokens of a case in the reader's chat layout.

    Args:
        tokenizer: The reader's tokenizer.
        case: Document and question.
        layout: ``query_aware`` (question, document, question) or ``read_once`` (document, question).
    """
    parts = [case.document, case.question]
    if layout == "query_aware":
        parts.insert(0, case.question)
    ids: list[int] = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    newlines = tokenizer.encode("\n\n", add_special_tokens=False)
    for i, part in enumerate(parts):
        ids += (newlines if i else []) + tokenizer.encode(part, add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|assistant|>")]


@torch.no_grad()
def answer_batch(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new: int = 220) -> list[str]:
    """Greedy answers to prompts without their thoughts, left-padded into one batch."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.rpartition(THOUGHTS[1])[2] for text in texts]


def window_cases(rng: random.Random, prose: Sequence[Prose], tokens: int, per_family: int, wording: str) -> list[Case]:
    """Cases that fit a window, the same number per family, or those of a file of ``recipes/handwritten``."""
    cases = []
    if wording in handwritten.FILES:
        for written in handwritten.read(wording):
            told = sum(map(len, written.statements + written.distractors))
            chars = int((tokens - 110) * CHARS_PER_TOKEN * rng.uniform(0.5, 1.0)) - told
            cases.append(written.case(rng, rng.choice(prose), max(0, chars)))
        return cases
    families = WORDED_FAMILIES if wording == "unseen" else FAMILIES
    for family in families:
        for _ in range(per_family * len(FAMILIES) // len(families)):
            chars = int((tokens - 190) * CHARS_PER_TOKEN * rng.uniform(0.5, 1.0))
            options = {"one_template": wording == "one-template", "canonical": wording == "canonical"}
            cases.append(make_case(rng, rng.choice(prose), chars, family, rng.randint(1, 3), **options))
    return cases


def in_window(
    folder: Path, prose: Sequence[Prose], tokens: int, per_family: int, wording: str, layout: str, seed: int
) -> dict[str, Any]:
    """Exact match per family within ``tokens`` tokens, with a few of the misses.

    Args:
        folder: Folder of the checkpoint.
        prose: Prose to hide facts in.
        tokens: Longest prompt, in tokens.
        per_family: Questions per family.
        wording: ``canonical``, ``varied``, ``one-template`` (varied, but all facts of a document in the same words),
            ``unseen`` (relations kept from training), or ``development`` or ``test`` (written by hand).
        layout: ``query_aware`` or ``read_once``.
        seed: Seed of the cases.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(f"window-{seed}-{tokens}-{wording}")
    cases = window_cases(rng, prose, tokens, per_family, wording)
    prompts = [prompt_ids(tokenizer, c, layout) for c in cases]
    kept = sorted((i for i in range(len(cases)) if len(prompts[i]) <= tokens), key=lambda i: len(prompts[i]))
    counts: dict[str, list[int]] = {}
    strict, misses = 0, []
    for start in range(0, len(kept), 16):
        chosen = kept[start : start + 16]
        for i, output in zip(chosen, answer_batch(model, tokenizer, [prompts[i] for i in chosen]), strict=True):
            case = cases[i]
            right = is_exact(output, case.answer, case.values)
            strict += normalise(output) == normalise(case.answer)
            names = ["all", case.family] + (["facts"] if case.values else [])
            names += ["short" if len(case.answer) == len(", ".join(case.values)) else "restated"] if case.values else []
            for name in names:
                row = counts.setdefault(name, [0, 0])
                row[0] += right
                row[1] += 1
            if not right:
                misses.append(
                    {"family": case.family, "question": case.question, "expected": case.answer, "got": output}
                )
    scores = {name: Score(*row).to_json() for name, row in sorted(counts.items())}
    longer = len(cases) - len(kept)
    return {
        "scores": scores,
        "verbatim": round(strict / max(1, len(kept)), 4),
        "left_out_as_too_long": longer,
        "misses": misses[:40],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the reader.")
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt prose with the held-out books")
    parser.add_argument("--models", type=Path, nargs="*", default=[MODELS / "reader", MODELS / "reader-plain"])
    parser.add_argument("--per-family", type=int, default=46)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON reports")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    sources = {"books": held_out_prose(args.text), "stories": story_prose()}
    for folder in args.models:
        for tokens in args.tokens:
            for source, wording, layout in SETTINGS:
                name = f"{folder.name} {tokens} {source} {wording} {layout}"
                report[name] = in_window(folder, sources[source], tokens, args.per_family, wording, layout, 0)
                print(name, {k: v["share"] for k, v in report[name]["scores"].items()}, flush=True)
                (args.out / "window.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
