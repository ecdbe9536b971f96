"""BABILong (Kuratov et al. 2024, arXiv 2406.10149): tasks qa1 to qa5, with the metric of its repository."""

from __future__ import annotations

from qllm_bench.published import metrics
from qllm_bench.published.example import Example, Row, Task
from qllm_bench.published.prompts import prompts
from qllm_bench.published.suite import Suite

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}
_TITLES = {
    "qa1": "qa1 (one fact)",
    "qa2": "qa2 (two facts)",
    "qa3": "qa3 (three facts)",
    "qa4": "qa4 (two arguments)",
    "qa5": "qa5 (three arguments)",
}
TASKS = {name: Task(name, title, prompts("babilong")[name], metrics.only_label, 20) for name, title in _TITLES.items()}


def parse(task: Task, row: Row) -> Example:
    """A row with the published fields `input` (the text), `question` and `target`.

    Raises:
        DatasetError: A field is missing or of another form.
    """
    question = row.text("question")
    return task.example(
        row.document("input").strip(),
        question,
        [row.text("target")],
        fields={"question": question},
        labels=LABELS[task.name],
    )


SUITE = Suite(
    name="babilong",
    title="BABILong",
    tasks=TASKS,
    rules={},
    parse=parse,
    file=lambda task, length: f"data/{task}/{length}.json",
    hub=lambda task, length: f"hf://datasets/RMT-team/babilong/data/{task}/{length}.json",
    by_length=True,
)
