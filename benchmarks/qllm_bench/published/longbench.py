"""LongBench (Bai et al. 2024, arXiv 2308.14508): the English and code tasks, with the limits and metrics of its repository.

The five Chinese tasks need a word segmenter and are left out. Published numbers cut prompts in the middle to the model's
length; here nothing is cut.
"""

from __future__ import annotations

from qllm_bench.published import metrics
from qllm_bench.published.example import Example, Metric, Row, Task
from qllm_bench.published.metrics import of_first_line
from qllm_bench.published.prompts import prompts
from qllm_bench.published.suite import Suite

# name: (title, metric, published limit of tokens)
_TASKS: dict[str, tuple[str, Metric, int]] = {
    "narrativeqa": ("NarrativeQA", metrics.word_f1, 128),
    "qasper": ("Qasper", metrics.word_f1, 128),
    "multifieldqa_en": ("MultiFieldQA-en", metrics.word_f1, 64),
    "hotpotqa": ("HotpotQA", metrics.word_f1, 32),
    "2wikimqa": ("2WikiMultihopQA", metrics.word_f1, 32),
    "musique": ("MuSiQue", metrics.word_f1, 32),
    "gov_report": ("GovReport", metrics.rouge_l, 512),
    "qmsum": ("QMSum", metrics.rouge_l, 512),
    "multi_news": ("MultiNews", metrics.rouge_l, 512),
    "trec": ("TREC", of_first_line(metrics.label_share), 64),
    "triviaqa": ("TriviaQA", of_first_line(metrics.word_f1), 32),
    "samsum": ("SAMSum", of_first_line(metrics.rouge_l), 128),
    "passage_count": ("PassageCount", metrics.number_share, 32),
    "passage_retrieval_en": ("PassageRetrieval-en", metrics.number_share, 32),
    "lcc": ("LCC", metrics.code_similarity, 64),
    "repobench-p": ("RepoBench-P", metrics.code_similarity, 64),
}
TASKS = {
    name: Task(name, title, prompts("longbench")[name], metric, limit)
    for name, (title, metric, limit) in _TASKS.items()
}


def parse(task: Task, row: Row) -> Example:
    """A row with the published fields `context`, `input` (empty for summaries), `answers` and, for TREC, `all_classes`.

    Raises:
        DatasetError: A field is missing or of another form.
    """
    labels = row.texts("all_classes") if task.name == "trec" else ()
    question = row.text("input")
    return task.example(row.text("context"), question, row.texts("answers"), fields={"input": question}, labels=labels)


SUITE = Suite(
    name="longbench",
    title="LongBench",
    tasks=TASKS,
    rules={},
    parse=parse,
    file=lambda task, _: f"{task}.jsonl",
    hub=lambda task, _: f"zip://data/{task}.jsonl::hf://datasets/THUDM/LongBench/data.zip",
)
