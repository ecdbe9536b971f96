"""`qllm bench needle`: facts at chosen depths of documents of chosen lengths, per policy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from qllm_bench import figures, tables
from qllm_bench.arguments import short
from qllm_bench.harness import Job, Label, run
from qllm_bench.journal import Journal
from qllm_bench.prose import Library
from qllm_bench.questions.data import Case, is_exact
from qllm_bench.questions.facts import FAMILIES, WORDED_FAMILIES
from qllm_bench.questions.haystack import make_haystack
from qllm_bench.scores import cells, difference, summarise
from qllm_bench.subject import ORDERS, POLICIES, REREAD, Example, Order, Setting, Subject
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidRequestError

#: Families whose answer is one value, so that a score says whether that one fact was found.
SIMPLE = ("passkey", "magic", "attribute", "kv", "place", "job", "code", "relation")
_ROOM = 48  # tokens of template and separators
_KEPT = 8_000_000  # tokens of documents that are kept for the next setting
_DRAWS = 5
_TRIES = 8  # until a document fills its length
_FACT = 50  # tokens of a document per fact
_QUESTION = 16  # tokens that other questions may have more than those of the first document


@dataclass(frozen=True)
class Plan:
    """What is asked of the documents.

    Attributes:
        lengths: Tokens of the whole prompt; documents fill it as far as they can.
        documents: Documents per length.
        needles: Facts asked for in each document (see `of_length`).
        depths: Number of depths, evenly from start to end.
        distractors: Further facts of the same kind per needle.
        families: Families of the facts, in turn.
        seed: Of documents and facts.
    """

    lengths: Sequence[int]
    documents: int
    needles: int
    depths: int
    distractors: int
    families: Sequence[str]
    seed: int

    def __post_init__(self) -> None:
        if self.needles > 1 and set(self.families) == {"passkey"}:
            raise InvalidRequestError("A document holds one pass key only; set --needles 1 or add other --families.")

    def describe(self) -> dict[str, Any]:
        """What every row of a journal has in common."""
        return {
            "families": list(self.families), "needles": self.needles, "depths": self.depths,
            "distractors": self.distractors, "seed": self.seed,
        }  # fmt: skip

    def of_length(self, tokens: int) -> Plan:
        """The same number of questions of documents of one length.

        Where the facts would take more than about half of a document, each is put into a document of its own.
        """
        if tokens >= _FACT * self.needles * (1 + self.distractors):
            return replace(self, lengths=[tokens])
        return replace(self, lengths=[tokens], needles=1, documents=self.documents * self.needles)

    def families_of(self, document: int) -> list[str]:
        """The families asked for in a document, in turn; a pass key once at most."""
        found: list[str] = []
        n = document * self.needles
        while len(found) < self.needles:
            family = self.families[n % len(self.families)]
            if family != "passkey" or family not in found:
                found.append(family)
            n += 1
        return found

    def depths_of(self, document: int) -> list[float]:
        """Their depths; over the documents every family comes to every depth."""
        cycle = math.lcm(len(self.families), self.depths)
        counts = range(document * self.needles, (document + 1) * self.needles)
        steps = max(1, self.depths - 1)
        return [round((n + n // cycle) % self.depths / steps, 3) if self.depths > 1 else 0.5 for n in counts]


class Haystacks:
    """The documents of a plan, each made when it is needed.

    Args:
        subject: Its tokenizer measures them.
        library: Prose.
        plan: What they hold.
    """

    def __init__(self, subject: Subject, library: Library, plan: Plan) -> None:
        self._subject, self._library, self._plan = subject, library, plan
        self._ratio = subject.chars_per_token(library.sample())
        kept = _KEPT // max(plan.lengths)
        self.of = lru_cache(maxsize=max(1, min(kept, plan.documents)))(self._make)

    def check(self) -> int:
        """Make the shortest documents; returns the tokens that a question may have.

        Raises:
            InvalidRequestError: The facts of one of them alone are longer.
        """
        shortest = min(self._plan.lengths)
        cases = [case for number in range(self._plan.documents) for case in self.of(shortest, number)]
        return _QUESTION + max(self._subject.llm.count_tokens(case.question) for case in cases)

    def _make(self, tokens: int, number: int) -> list[Case]:
        """Cases of one document that fits ``tokens`` tokens with question and template.

        Raises:
            InvalidRequestError: Its facts alone are longer, however often they are drawn.
        """
        for draw in ("", *(f"-{n}" for n in range(1, _DRAWS))):
            cases = self._fitted(tokens, number, draw)
            if cases is not None:
                return cases
        plan = self._plan
        raise InvalidRequestError(
            f"{plan.needles} facts with {plan.distractors} distractors each do not fit {tokens} tokens; raise --lengths, or "
            "lower --needles or --distractors."
        )

    def _fitted(self, tokens: int, number: int, draw: str) -> list[Case] | None:
        """Cases of one draw in as much prose as fills the document to 5 %, or None when they do not fit."""
        plan = self._plan
        n_chars = round((tokens - _ROOM) * self._ratio)
        best: tuple[int, list[Case]] | None = None
        for _ in range(_TRIES):
            if n_chars <= 0:
                break
            rng = random.Random(f"needle-{self._library.split}-{plan.seed}-{tokens}-{number}{draw}")
            prose = self._library.draw(rng, n_chars)
            cases = make_haystack(
                rng, prose, n_chars, plan.families_of(number), plan.depths_of(number), plan.distractors
            )
            count = self._subject.llm.count_tokens
            room = _ROOM + 2 * max(count(case.question) for case in cases)
            left = tokens - room - count(cases[0].document)
            if left < 0:
                n_chars += int(left * self._ratio * 1.05) - 8
                continue
            if best is None or left < best[0]:
                best = left, cases
            if left <= 0.05 * tokens:
                break
            n_chars += int((left - 0.01 * tokens) * self._ratio)
        return None if best is None else best[1]


def jobs(subject: Subject, settings: Sequence[Setting], haystacks: Haystacks, plan: Plan) -> list[Job]:
    """Every question of a plan of one length under every setting, document by document: readings serve all they can."""
    [tokens] = plan.lengths
    found = []
    kinds = list(dict.fromkeys(setting.memory for setting in settings))
    settings = sorted(settings, key=lambda setting: (setting.reads_once, kinds.index(setting.memory)))
    for document in range(plan.documents):
        pairs = list(zip(plan.families_of(document), plan.depths_of(document), strict=True))
        read: MemoryConfig | None = None
        for setting in settings:
            for needle, (family, depth) in enumerate(pairs):
                labels: dict[str, Label] = {
                    "policy": setting.name, "order": setting.order, "tokens": tokens, "document": document,
                    "depth": depth, "family": family,
                }  # fmt: skip
                key = f"{setting.name}/{setting.order}/{tokens}/{document}/{needle}"
                work = partial(ask, subject, setting, haystacks, tokens, document, needle)
                found.append(Job(key, labels, 64 if setting.memory == read else tokens, work))
                read = setting.memory if setting.reads_once else None
    return found


def ask(
    subject: Subject,
    setting: Setting,
    haystacks: Haystacks,
    tokens: int,
    document: int,
    needle: int,
    progress: Callable[[int, int], None],
) -> Mapping[str, Any]:
    """The work of a job: ask for one needle of one document."""
    return subject.ask(
        setting, example(haystacks.of(tokens, document)[needle], reading=f"{tokens}/{document}"), progress
    )


def example(case: Case, reading: str | None = None) -> Example:
    """A case of the generator, scored by its exact-match rule."""
    return Example(
        document=case.document,
        question=case.question,
        expected=case.answer,
        score=lambda output: float(is_exact(output, case.answer, case.values)),
        spans=case.spans,
        reading=reading,
    )


def about(subject: Subject, library: Library, plan: Plan) -> dict[str, Any]:
    """What all rows of a journal have in common."""
    return {
        **subject.describe(),
        "prose": library.name,
        "split": library.split,
        **plan.describe(),
        "trained_length": subject.trained_length,
        "memory": subject.base.model_dump(),
    }


def bench(
    subject: Subject,
    library: Library,
    plan: Plan,
    documents: Mapping[int, int],
    policies: Sequence[str],
    orders: Sequence[Order],
    out: Path,
) -> Journal:
    """Run the plan under every policy and order; writes ``needle.jsonl``, ``.json``, ``.md`` and figures to ``out``.

    Lengths within the model's trained window are also read with dense attention (policy "full"): what the others are
    compared with.

    Args:
        subject: The model.
        library: Prose.
        plan: What is asked.
        documents: Documents of each length, in place of the plan's.
        policies, orders: Settings; settings of the same memory stand together to share readings.
        out: Folder of results.
    """
    settings = [subject.setting(policy, order) for policy in policies for order in orders]
    # within the window nothing is read again
    near = dict.fromkeys(REREAD.get(order, order) for order in orders)
    dense = [subject.setting("full", order) for order in near if "full" not in policies]
    parts = [replace(plan, documents=count).of_length(tokens) for tokens, count in documents.items()]
    haystacks = [Haystacks(subject, library, part) for part in parts]
    subject.check_fits(settings, max(documents), haystacks[0].check())
    journal = Journal(out, "needle", about(subject, library, plan))
    arguments = {"documents": documents, "policies": policies, "orders": orders}
    journal.begin(arguments, subject.device)
    try:
        todo = []
        for part, found in zip(parts, haystacks, strict=True):
            within = part.lengths[0] <= subject.trained_length
            todo += jobs(subject, [*dense, *settings] if within else settings, found, part)
        run(journal, todo)
    finally:
        subject.forget()
    report(journal)
    return journal


def report(journal: Journal) -> str:
    """Write JSON, Markdown and figures of what the journal holds; returns the Markdown."""
    rows = sorted(journal.rows, key=lambda r: (POLICIES.index(r["policy"]), ORDERS.index(r["order"]), r["tokens"]))
    near = _within(rows, journal.subject["trained_length"])
    by_length = cells(rows, ("policy", "order", "tokens"))
    by_depth = cells(rows, ("policy", "order", "tokens", "depth"))
    by_family = cells(rows, ("policy", "order", "tokens", "family"))
    for c in (*by_length, *by_family):
        known = near.get((c["order"], c.get("family")))
        c["difference"] = difference(c, known) if known and c["tokens"] > journal.subject["trained_length"] else None
    journal.report(by_length=by_length, by_depth=by_depth, by_family=by_family)
    lengths = sorted({row["tokens"] for row in rows})
    names = {n: short(n) for n in lengths}
    families = [family for family in (*FAMILIES, *WORDED_FAMILIES) if any(row["family"] == family for row in rows)]
    parts = [
        tables.pivot(by_length, ("policy", "order"), "tokens", names),
        _family_table(by_length, by_family, families),
    ]
    text = "\n\n".join(parts)
    path = journal.path
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    for label, found, values in (
        ("depth", by_depth, sorted({row["depth"] for row in rows})),
        ("family", by_family, families),
    ):
        panels: dict[str, dict[tuple[int, Any], Any]] = {}
        for c in found:
            panels.setdefault(f"{c['policy']}, question {c['order']}", {})[c["tokens"], c[label]] = c
        figures.heatmaps(path.with_name(f"needle_{label}.png"), panels, lengths, values, label)
    lines: dict[str, dict[str, list[tuple[float, Any]]]] = {}
    for c in by_length:
        lines.setdefault(f"question {c['order']}", {}).setdefault(c["policy"], []).append((c["tokens"], c))
    figures.lines(path.with_name("needle_length.png"), lines, "tokens in the prompt")
    return text


def _within(rows: Sequence[Mapping[str, Any]], trained_length: int) -> dict[tuple[str, str | None], dict[str, Any]]:
    """What dense attention does within the trained length, by order and family (None: all of them).

    They serve reading again, too.
    """
    scores: dict[tuple[str, str | None], list[float]] = {}
    for row in rows:
        if row["policy"] == "full" and row["tokens"] <= trained_length:
            for order in (row["order"], *(again for again, near in REREAD.items() if near == row["order"])):
                for family in (row["family"], None):
                    scores.setdefault((order, family), []).append(row["score"])
    return {key: summarise(found) for key, found in scores.items()}


def _family_table(
    by_length: Sequence[Mapping[str, Any]], by_family: Sequence[Mapping[str, Any]], families: Sequence[str]
) -> str:
    """A row per policy, order and length: every family, and all of them against those within the window."""
    found = {(c["policy"], c["order"], c["tokens"], c["family"]): c for c in by_family}
    header = ["policy", "order", "tokens", *families, "difference to in-window, points"]
    rows = []
    for c in by_length:
        label = (c["policy"], c["order"], c["tokens"])
        scores = [tables.count(found.get((*label, family))) for family in families]
        rows.append([c["policy"], c["order"], short(c["tokens"]), *scores, tables.points(c["difference"])])
    return tables.markdown(header, rows)
