"""`qllm bench policies`: accuracy against every setting of the memory, on development and on test documents."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from qllm_bench import figures, tables
from qllm_bench.harness import Job, Label, run
from qllm_bench.journal import Journal
from qllm_bench.needle import Haystacks, Plan, ask
from qllm_bench.prose import Library, Split
from qllm_bench.scores import summarise
from qllm_bench.subject import ORDERS, Setting, Subject
from qllm_bench.sweeps import BASE, Named, fitting, identity
from qllm_runtime.errors import InvalidRequestError

WITHIN = "within the window"


def jobs(subject: Subject, settings: Sequence[Setting], haystacks: Mapping[Split, Haystacks], plan: Plan) -> list[Job]:
    """Every question of a plan of one length under every setting; settings of two names are asked once."""
    [tokens] = plan.lengths
    found = []
    for name, setting in {identity(s): s for s in settings}.items():
        for split, stacks in haystacks.items():
            for document in range(plan.documents):
                for needle, family in enumerate(plan.families_of(document)):
                    labels: dict[str, Label] = {
                        "setting": name, "tokens": tokens, "split": split, "document": document, "family": family,
                    }  # fmt: skip
                    key = f"{name}/{tokens}/{split}/{document}/{needle}"
                    work = partial(ask, subject, setting, stacks, tokens, document, needle)
                    shared = setting.reads_once and needle > 0
                    found.append(Job(key, labels, 64 if shared else tokens, work))
    return found


def bench(
    subject: Subject, libraries: Sequence[Library], plan: Plan, sweeps: Mapping[str, Sequence[Named]], out: Path
) -> Journal:
    """Ask the questions of a plan (of one length) under all settings; writes ``policies.*`` to ``out``.

    The same facts hidden in documents within the trained length, read with dense attention, show what the reading alone can do.
    Attention budgets whose window cannot hold the questions are left out, which a line on stderr says.
    """
    tokens = min(plan.lengths)
    plan = plan.of_length(tokens)
    reference = subject.setting("full")
    haystacks = {library.split: Haystacks(subject, library, plan) for library in libraries}
    near = plan.of_length(min(tokens, subject.trained_length))
    references = {library.split: Haystacks(subject, library, near) for library in libraries}
    question = max(stacks.check() for stacks in (*haystacks.values(), *references.values()))
    sweeps, narrow = fitting(sweeps, question)
    settings = [setting for named in sweeps.values() for _, setting in named]
    subject.check_fits(settings, tokens, question)
    if narrow:
        print(
            f"policies: attention budgets of {', '.join(map(str, narrow))} tokens are left out, half of them (the window) "
            f"cannot hold questions of up to {question} tokens.",
            file=sys.stderr,
        )
    about = {**subject.describe(), "prose": libraries[0].name, "tokens": tokens, **plan.describe()}
    journal = Journal(out, "policies", {**about, "memory": subject.base.model_dump()})
    _check_order(journal, sweeps)
    names = {sweep: [[name, identity(s)] for name, s in named] for sweep, named in sweeps.items()}
    arguments = {"documents": plan.documents, "splits": list(haystacks), "sweeps": names, WITHIN: identity(reference)}
    journal.begin(arguments, subject.device)
    try:
        todo = [*jobs(subject, [reference], references, near), *jobs(subject, settings, haystacks, plan)]
        # within the window a setting may be the reference itself
        run(journal, list({job.key: job for job in todo}.values()))
    finally:
        subject.forget()
    report(journal)
    return journal


def _check_order(journal: Journal, sweeps: Mapping[str, Sequence[Named]]) -> None:
    """Refuse results whose base, apart from memory settings that the subject names, has the question elsewhere.

    Raises:
        InvalidRequestError: There are some.
    """
    [now, *_] = [setting for named in sweeps.values() for name, setting in named if name == BASE]
    sweeps_before = [settings for line in journal.runs for settings in line["run"]["arguments"]["sweeps"].values()]
    before = {key for settings in sweeps_before for name, key in settings if name == BASE}
    if before - {identity(now)}:
        was = [order for order in ORDERS if identity(replace(now, order=order)) in before - {identity(now)}]
        raise InvalidRequestError(
            f"{journal.path} holds results of --order {' or '.join(was) or '(unknown)'} (now {now.order}), which its tables "
            "would mix; give another --out, or remove the file to start anew."
        )


def report(journal: Journal) -> str:
    """Write JSON, Markdown and figures of what the journal holds; returns the Markdown."""
    named: dict[str, dict[str, str]] = {}
    for line in journal.runs:
        for sweep, settings in line["run"]["arguments"]["sweeps"].items():
            named.setdefault(sweep, {}).update(settings)
        reference = line["run"]["arguments"][WITHIN]
    answers: dict[str, dict[str, dict[str, float]]] = {}
    for row in journal.rows:
        question = row["key"].split("/", 1)[1]
        answers.setdefault(row["setting"], {}).setdefault(row["split"], {})[question] = row["score"]
    splits = list(dict.fromkeys(row["split"] for row in journal.rows))
    stacks = {(row["split"], row["key"].split("/")[3]) for row in journal.rows}
    documents = {split: sum(split == s for s, _ in stacks) for split in splits}
    sections: dict[str, list[dict[str, Any]]] = {}
    within = {"setting": WITHIN, **_scores(answers.get(reference, {}), {})}
    for sweep, settings in named.items():
        base = answers.get(settings[BASE], {})
        sections[sweep] = [
            {"setting": name, "id": key, **_scores(answers.get(key, {}), base)} for name, key in settings.items()
        ]
    journal.report(documents=documents, within=within, sweeps=sections)
    text = _tables(sections, within, documents)
    journal.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    _draw(journal.path, sections, splits)
    return text


def _tables(
    sections: Mapping[str, Sequence[Mapping[str, Any]]], within: Mapping[str, Any], documents: Mapping[str, int]
) -> str:
    """Markdown: a table per sweep, with the numbers of documents per split in its header."""
    columns = [f"{split}, {n} document{'s' * (n > 1)}" for split, n in documents.items()]
    parts = []
    for sweep, rows in sections.items():
        body = [_line(row, list(documents)) for row in (*rows, within)]
        parts.append(tables.markdown([sweep, *columns, *(f"won, lost ({split})" for split in documents)], body))
    return "\n\n".join(parts)


def _draw(path: Path, sections: Mapping[str, Sequence[Mapping[str, Any]]], splits: Sequence[str]) -> None:
    """Intervals of every sweep, and lines over the attention budget, as figures beside the journal."""
    groups = {
        sweep: [(row["setting"], {split: row[split] for split in splits if split in row}) for row in rows]
        for sweep, rows in sections.items()
        if sweep != "budget"
    }
    if groups:
        figures.intervals(path.with_name("policies_settings.png"), groups, get_args(Split))
    panels: dict[str, dict[str, list[tuple[float, Any]]]] = {}
    for row in sections.get("budget", ()):
        policy, _, budget = row["setting"].partition(", ")
        for split in splits:
            if budget and split in row:
                series = panels.setdefault(f"{split} documents", {})
                series.setdefault(policy, []).append((int(budget), row[split]))
    if panels:
        figures.lines(path.with_name("policies_budget.png"), panels, "attention budget: window + looked up (tokens)")


def _scores(answers: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Summary per split, with the questions that only this setting and that only the base got right."""
    found: dict[str, Any] = {}
    for split, scores in answers.items():
        common = [(score, base[split][key]) for key, score in scores.items() if key in base.get(split, {})]
        found[split] = {
            **summarise(list(scores.values())),
            "won": sum(a > b for a, b in common),
            "lost": sum(a < b for a, b in common),
        }
    return found


def _line(row: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    compared = [f"{row[s]['won']}, {row[s]['lost']}" if s in row and "id" in row else "-" for s in splits]
    return [row["setting"], *(tables.cell(row.get(split)) for split in splits), *compared]
