"""`qllm bench rag`: reading the whole document against retrieving chunks of it, on the same questions with the same model."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from qllm_bench import figures, tables
from qllm_bench.arguments import short
from qllm_bench.harness import Job, Label, run
from qllm_bench.journal import Journal
from qllm_bench.prose import Library
from qllm_bench.questions.data import Case, is_exact
from qllm_bench.rag_questions import FAMILIES, PLAIN, make_document
from qllm_bench.rag_systems import ANSWER, MeanPooled, Retrieval, System, Whole
from qllm_bench.scores import cells
from qllm_bench.subject import Order, Subject
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Progress

_ROOM = 48  # tokens of template and separators
_QUESTION = 16  # tokens that other questions may have more than those of the shortest documents
_TRIES = 6  # until a document fills its length to 2 %


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        lengths: Tokens of the whole prompt when the document is read whole.
        documents: Documents per length; each has a question of every family.
        families: Kinds of questions.
        distractors: Facts of the same kind about other subjects, per question.
        seed: Of documents and facts.
    """

    lengths: Sequence[int]
    documents: int
    families: Sequence[str]
    distractors: int
    seed: int

    def describe(self) -> dict[str, Any]:
        """What every row of a journal has in common."""
        return {"families": list(self.families), "distractors": self.distractors, "seed": self.seed}


class Documents:
    """The documents of a plan, each made when it is needed.

    Args:
        subject: Its tokenizer measures them.
        library: Prose.
        plan: What they hold.
    """

    def __init__(self, subject: Subject, library: Library, plan: Plan) -> None:
        self._count, self._library, self._plan = subject.llm.count_tokens, library, plan
        self._ratio = subject.chars_per_token(library.sample())
        self.of = lru_cache(maxsize=2)(self._make)

    def check(self) -> int:
        """Make all documents of the shortest length; returns the tokens that a question may have.

        Raises:
            InvalidRequestError: The facts of one of them alone are longer.
        """
        shortest = min(self._plan.lengths)
        cases = [case for number in range(self._plan.documents) for case in self.of(shortest, number)]
        return _QUESTION + max(self._count(case.question) for case in cases)

    def _make(self, tokens: int, number: int) -> list[Case]:
        """Cases of one document that fits ``tokens`` tokens with question and template.

        Raises:
            InvalidRequestError: The facts alone are longer.
        """
        plan = self._plan
        n_chars = round((tokens - _ROOM) * self._ratio)
        best: list[Case] | None = None
        for _ in range(_TRIES):
            if n_chars <= 0:
                break
            rng = random.Random(f"rag-{self._library.split}-{plan.seed}-{tokens}-{number}")
            prose = self._library.draw(rng, n_chars)
            cases = make_document(rng, prose, n_chars, plan.families, plan.distractors)
            room = _ROOM + 2 * max(self._count(case.question) for case in cases)
            left = tokens - room - self._count(cases[0].document)
            if left >= 0:
                best = cases
                if left < 0.02 * tokens:
                    break
            n_chars += int((left - 0.01 * tokens) * self._ratio)
        if best is not None:
            return best
        raise InvalidRequestError(
            f"{len(plan.families)} facts with {plan.distractors} distractors each do not fit {tokens} tokens; raise --lengths, "
            "or lower --distractors."
        )


def systems(
    subject: Subject,
    orders: Sequence[Order],
    chunks: Sequence[int],
    embeddings: str | None,
    loading: Mapping[str, Any],
) -> list[System]:
    """What is compared: whole documents, and BM25, embeddings and perfect retrieval for every size of chunks.

    Raises:
        InvalidRequestError: Chunks too large for the model.
        ModelNotFoundError: No such embedding model.
    """
    setting = subject.setting("qllm")
    found: list[System] = [Whole(subject, subject.setting("qllm", order)) for order in orders]
    vectors = MeanPooled(embeddings) if embeddings else None
    for size in chunks:
        found.append(Retrieval(subject, setting, "bm25", size, loading))
        if vectors is not None:
            found.append(Retrieval(subject, setting, vectors.name, size, loading, vectors))
        found.append(Retrieval(subject, setting, "perfect", size, loading))
    return found


class Desk:
    """Has one document in one system at a time, so that it is taken in once for all its questions."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._taken: tuple[System, int, int] | None = None

    def ask(self, system: System, tokens: int, document: int, n: int, progress: Progress) -> Mapping[str, Any]:
        """Ask question ``n`` of a document; ``index_s`` is None where the document had been taken in before."""
        case = self._documents.of(tokens, document)[n]
        index_s = None
        if self._taken != (system, tokens, document):
            began = time.perf_counter()
            system.index(case.document, progress)
            index_s = round(time.perf_counter() - began, 4)
            self._taken = (system, tokens, document)
        began = time.perf_counter()
        reply = system.answer(case, progress)
        return {
            "score": float(is_exact(reply.text, case.answer, case.values)),
            "hit": reply.hit,
            "output": reply.text,
            "expected": case.answer,
            "question": case.question,
            "prompt_tokens": reply.prompt_tokens,
            "index_s": index_s,
            "answer_s": round(time.perf_counter() - began, 4),
            "search_s": round(reply.search_s, 4),
        }


def jobs(compared: Sequence[System], documents: Documents, plan: Plan) -> list[Job]:
    """Every question to every system, document by document."""
    desk = Desk(documents)
    found = []
    for tokens in plan.lengths:
        for document in range(plan.documents):
            for system in compared:
                for n, family in enumerate(plan.families):
                    labels: dict[str, Label] = {
                        "system": system.name, "tokens": tokens, "document": document, "family": family,
                    }  # fmt: skip
                    key = f"{system.name}/{tokens}/{document}/{family}"
                    reads = isinstance(system, Whole) and (n == 0 or not system.reads_once)
                    work = partial(desk.ask, system, tokens, document, n)
                    found.append(Job(key, labels, tokens if reads else 512, work))
    return found


def bench(
    subject: Subject, library: Library, plan: Plan, compared: Sequence[System], arguments: Mapping[str, Any], out: Path
) -> Journal:
    """Run the plan; writes ``rag.jsonl``, ``.json``, ``.md`` and figures to ``out``."""
    documents = Documents(subject, library, plan)
    read = [system.setting for system in compared if isinstance(system, Whole)]
    subject.check_fits(read, max(plan.lengths), documents.check())
    about = {**subject.describe(), "prose": library.name, "split": library.split, **plan.describe()}
    memory = subject.base.model_dump()
    journal = Journal(out, "rag", {**about, "memory": memory, "answer_tokens": ANSWER})
    journal.begin({"lengths": plan.lengths, "documents": plan.documents, **arguments}, subject.device)
    run(journal, jobs(compared, documents, plan))
    report(journal)
    return journal


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def costs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean seconds to take a document in and to answer, and tokens put before the model, per length and system."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["tokens"], row["system"]), []).append(row)
    return [
        {
            "tokens": tokens, "system": system,
            **{name: _mean([r[name] for r in found]) for name in ("prompt_tokens", "index_s", "search_s", "answer_s")},
        }
        for (tokens, system), found in groups.items()
    ]  # fmt: skip


def report(journal: Journal) -> str:
    """Write JSON, Markdown and figures of what the journal holds; returns the Markdown."""
    rows = [{**row, "kind": "plain" if row["family"] in PLAIN else row["family"]} for row in journal.rows]
    rows.sort(key=lambda row: (FAMILIES.index(row["family"]), row["tokens"]))
    found = [{**row, "score": float(row["hit"])} for row in rows if row["hit"] is not None]
    by_kind = cells(rows, ("tokens", "kind", "system"))
    by_family = cells(rows, ("tokens", "family", "system"))
    hits = cells(found, ("tokens", "kind", "system"))
    overall = cells(rows, ("system", "tokens"))
    spent = costs(sorted(rows, key=lambda row: row["tokens"]))
    journal.report(overall=overall, by_kind=by_kind, by_family=by_family, hits=hits, costs=spent)
    lengths = sorted({row["tokens"] for row in rows})
    names = {n: short(n) for n in lengths}
    header = ["tokens", "system", "tokens before the model", "index, s", "search, s", "answer, s"]
    text = "\n\n".join(
        (
            "Right answers:",
            tables.pivot(overall, ("system",), "tokens", names),
            tables.pivot(by_kind, ("kind", "system"), "tokens", names),
            "Retrieved all that the answer rests on:",
            tables.pivot(hits, ("kind", "system"), "tokens", names),
            "Means per document and question:",
            tables.markdown(
                header,
                [
                    [names[c["tokens"]], c["system"], *("-" if c[k] is None else f"{c[k]:.4g}" for k in list(c)[2:])]
                    for c in spent
                ],
            ),
        )
    )
    path = journal.path
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    order = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    panels: dict[str, dict[tuple[int, Any], Any]] = {}
    for c in by_family:
        panels.setdefault(c["system"], {})[c["tokens"], c["family"]] = c
    figures.heatmaps(path.with_name("rag_family.png"), panels, lengths, order, "family")
    lines: dict[str, list[tuple[float, Any]]] = {}
    for c in sorted(overall, key=lambda c: c["tokens"]):
        lines.setdefault(c["system"], []).append((c["tokens"], c))
    figures.lines(path.with_name("rag_length.png"), {"all kinds of questions": lines}, "tokens in the document")
    return text
