"""`qllm bench infinite`: tasks of published benchmarks, made by rule at any length or read from their files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from qllm_bench import figures, published, tables
from qllm_bench.arguments import short
from qllm_bench.harness import Job, Label, run
from qllm_bench.journal import Journal
from qllm_bench.published import versions
from qllm_bench.published.example import Example
from qllm_bench.published.suite import Suite
from qllm_bench.scores import cells, mean
from qllm_bench.subject import Example as Case
from qllm_bench.subject import Order, Setting, Subject
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Progress

_ROOM = 48  # tokens of template and separators
_PLACE = 5  # parts of a key that say which question is asked in which way; after them is the version
_QUESTION = 16  # tokens that a question may have more than that of the least text


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        suite: The benchmark.
        tasks: Names of its tasks.
        lengths: Tokens of the whole prompt of tasks made by rule, or the lengths whose files are read; empty where files
            don't differ by length.
        questions: Questions per task and length; None: all of the files.
        data: Folder of the files, "hub" for the Hugging Face hub, or None to make the tasks by rule.
        seed: Of tasks made by rule.
    """

    suite: Suite
    tasks: Sequence[str]
    lengths: Sequence[int]
    questions: int | None
    data: Path | Literal["hub"] | None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data is not None:
            return
        known = ", ".join(self.suite.rules) or "none"
        unmade = [task for task in self.tasks if task not in self.suite.rules]
        if unmade:
            raise InvalidRequestError(
                f"{', '.join(unmade)} cannot be made by rule (of {self.suite.title}: {known}); give the folder of the "
                "published files with --data, or --data hub to fetch them."
            )

    def describe(self) -> dict[str, Any]:
        """What every row of a journal has in common."""
        made = {"data": "made by rule", "seed": self.seed}
        data = str(self.data.resolve()) if isinstance(self.data, Path) else self.data
        return {"suite": self.suite.name, **(made if data is None else {"data": data})}


@dataclass(frozen=True)
class Question:
    """Where one question comes from.

    Attributes:
        task, number: Which one it is.
        tokens: Length of its prompt, or that its file is named by; 0 where files don't differ by length.
        size: Tokens it will take, about; for the progress bar.
        example: The question itself, where it was read from a file.
    """

    task: str
    number: int
    tokens: int
    size: int
    example: Example | None = None


#: Examples of files by task and length.
Files = Mapping[tuple[str, int], Sequence[Example]]


def read_files(plan: Plan) -> Files:
    """All questions of the plan's files; nothing where tasks are made by rule.

    Raises:
        DatasetError: A file isn't as published.
    """
    if plan.data is None:
        return {}
    folder = plan.data if isinstance(plan.data, Path) else None
    return {
        (task, tokens): plan.suite.read(task, short(tokens) if tokens else "0k", folder)[: plan.questions]
        for tokens in plan.lengths or [0]
        for task in plan.tasks
    }


class Questions:
    """The questions of a plan; those made by rule are made when they are needed.

    Args:
        subject: Its tokenizer measures them.
        plan: What is asked.
        files: What was read for it.
    """

    def __init__(self, subject: Subject, plan: Plan, files: Files) -> None:
        self._subject, self._plan = subject, plan
        self._make = lru_cache(maxsize=1)(self._made)
        self.all = list(self._read(files) if plan.data is not None else self._rules())

    def _rules(self) -> Iterator[Question]:
        plan = self._plan
        for tokens in plan.lengths:
            for task in plan.tasks:
                for number in range(plan.questions or 1):
                    yield Question(task, number, tokens, tokens)

    def _read(self, files: Files) -> Iterator[Question]:
        for (task, tokens), examples in files.items():
            ratio = self._subject.chars_per_token(examples[0].document[:20_000])
            for number, example in enumerate(examples):
                yield Question(task, number, tokens, round(len(example.document) / ratio), example)

    def check(self, settings: Sequence[Setting]) -> None:
        """Refuse questions that a setting can't take, all of them before the first is asked.

        Raises:
            LengthError: A length is too short for a question.
            InvalidRequestError: A text or a question is too long for a setting.
        """
        plan, count = self._plan, self._subject.llm.count_tokens
        if plan.data is None:
            seed = str(plan.seed)
            found = [plan.suite.shortest(q.task, q.number, q.tokens - _ROOM, count, seed) for q in self.all]
            longest, slack = max(plan.lengths), _QUESTION
        else:
            found = [self.example(question) for question in self.all]
            dense = any(setting.memory.policy == "full" for setting in settings)  # what alone limits the text
            longest = _ROOM + max(example.tokens(count) for example in found) if dense else 0
            slack = 0
        self._subject.check_fits(settings, longest, slack + max(count(example.question) for example in found))

    def example(self, question: Question) -> Example:
        """The question with its text."""
        return question.example or self._make(question.task, question.number, question.tokens)

    def _made(self, task: str, number: int, tokens: int) -> Example:
        plan = self._plan
        return plan.suite.make(task, number, tokens - _ROOM, self._subject.llm.count_tokens, str(plan.seed))


def case(suite: Suite, example: Example) -> Case:
    """A published question as the harness asks it; the oracle's spans are where the answers stand."""
    found = [m.span() for answer in set(example.answers) for m in re.finditer(re.escape(answer), example.document)]
    metric = suite.tasks[example.task].metric
    return Case(
        document=example.document,
        question=example.question,
        closing=example.closing,
        system=example.instruction or None,
        expected=" | ".join(example.answers),
        score=lambda output: metric(output, example),
        spans=tuple(found),
        max_tokens=example.max_tokens,
        leads=example.leads,
    )


def version(suite: Suite, task: str, example: Example | None) -> str:
    """Digits that change with all that a row hangs on besides policy, order, task, length and number.

    Args:
        suite: The benchmark.
        task: Name of a task.
        example: The question, where it was read from a file.
    """
    return versions.of_rule(suite, task) if example is None else versions.of_question(example, suite.tasks[task].metric)


def _version_of(row: Mapping[str, Any]) -> str:
    """The version in a row's key; "" in keys of before there were any."""
    return "/".join(row["key"].split("/")[_PLACE:])


def replaced(row: Mapping[str, Any], plan: Plan, files: Files) -> bool:
    """Whether a row answers a question that its file or rule no longer has, or was scored by another metric.

    Args:
        row: Of a journal.
        plan: The present plan; of other tasks and lengths nothing is said.
        files: The questions that were read for it.
    """
    task, number = row["task"], row["number"]
    if plan.data is None:
        return task in plan.tasks and _version_of(row) != version(plan.suite, task, None)
    examples = files.get((task, row["tokens"]))
    if examples is None:
        return False
    if number >= len(examples):
        return plan.questions is None
    return _version_of(row) != version(plan.suite, task, examples[number])


def latest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of tasks made by rule, but for those of an earlier version than the task's last row."""
    last = {row["task"]: _version_of(row) for row in rows}
    return [row for row in rows if _version_of(row) == last[row["task"]]]


def jobs(subject: Subject, settings: Sequence[Setting], questions: Questions, plan: Plan) -> list[Job]:
    """Every question under every setting, question by question."""
    found = []
    for question in questions.all:
        for setting in settings:
            labels: dict[str, Label] = {
                "policy": setting.name, "order": setting.order, "task": question.task, "tokens": question.tokens,
                "number": question.number,
            }  # fmt: skip
            key = f"{setting.name}/{setting.order}/{question.task}/{question.tokens}/{question.number}"
            key += f"/{version(plan.suite, question.task, question.example)}"
            found.append(Job(key, labels, question.size, partial(_ask, subject, setting, questions, plan, question)))
    return found


def _ask(
    subject: Subject, setting: Setting, questions: Questions, plan: Plan, question: Question, progress: Progress
) -> Mapping[str, Any]:
    return subject.ask(setting, case(plan.suite, questions.example(question)), progress)


def bench(
    subject: Subject, plan: Plan, files: Files, policies: Sequence[str], orders: Sequence[Order], out: Path
) -> Journal:
    """Ask the plan's questions under every policy and order; results go to ``<out>/<suite>.*``."""
    if "oracle" in policies and (plan.data is not None or "math_find" in plan.tasks):
        raise InvalidRequestError(
            "The oracle must be told where the answer stands, which only tasks made by rule and not math_find say; leave "
            "policy 'oracle' out."
        )
    settings = [subject.setting(policy, order) for policy in policies for order in orders]
    questions = Questions(subject, plan, files)
    questions.check(settings)
    about = {**subject.describe(), **plan.describe(), "memory": subject.base.model_dump()}
    journal = Journal(out, plan.suite.name, about)
    arguments = {
        "tasks": plan.tasks, "lengths": plan.lengths, "questions": plan.questions, "policies": policies, "orders": orders,
    }  # fmt: skip
    journal.begin(arguments, subject.device)
    run(journal, jobs(subject, settings, questions, plan))
    report(journal, [row for row in journal.rows if not replaced(row, plan, files)])
    return journal


def means(by_task: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the tasks of every policy, order and length, which weigh the same however many questions they have.

    Where not all tasks were asked there is none: means of different tasks do not compare.

    Args:
        by_task: A summary per policy, order, task and length.
    """
    labels = ("policy", "order", "tokens")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for summary in by_task:
        groups.setdefault(tuple(summary[name] for name in labels), []).append(summary)
    n_tasks = len({summary["task"] for summary in by_task})
    return [
        {**dict(zip(labels, group, strict=True)), **mean(found)}
        for group, found in groups.items()
        if len(found) == n_tasks
    ]


def report(journal: Journal, chosen: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Write JSON, Markdown and a figure of some of the journal's rows; returns the Markdown.

    Args:
        journal: Of a suite.
        chosen: The rows; None: those of the latest versions of tasks made by rule.
    """
    suite = published.SUITES[journal.name]
    tasks = list(suite.tasks)
    rows = latest(journal.rows) if chosen is None else list(chosen)
    rows.sort(key=lambda row: (row["tokens"], tasks.index(row["task"])))
    by_task = cells(rows, ("policy", "order", "task", "tokens"))
    overall = means(by_task)
    journal.report(cases=len(rows), overall=overall, by_task=by_task)
    lengths = sorted({row["tokens"] for row in rows})
    names = {n: short(n) if n else "0k" if suite.by_length else "score" for n in lengths}
    text = tables.pivot(by_task, ("task", "policy", "order"), "tokens", names)
    if overall:
        text = "\n\n".join(("Mean of the tasks:", tables.pivot(overall, ("policy", "order"), "tokens", names), text))
    path = journal.path
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    shown = [task for task in tasks if any(row["task"] == task for row in rows)]
    if lengths == [0]:
        panels = {
            task: [(f"{c['policy']}, {c['order']}", {"score": c}) for c in by_task if c["task"] == task]
            for task in shown
        }
        figures.intervals(path.with_suffix(".png"), panels, ["score"])
    else:
        maps: dict[str, dict[tuple[int, Any], Any]] = {}
        for c in by_task:
            maps.setdefault(f"{c['policy']}, question {c['order']}", {})[c["tokens"], c["task"]] = c
        figures.heatmaps(path.with_suffix(".png"), maps, lengths, shown, "task")
    return text
