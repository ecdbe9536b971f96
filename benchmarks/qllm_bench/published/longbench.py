"""LongBench (Bai et al. 2024, arXiv 2308.14508): the English and code tasks, with the limits and metrics of its repository.

The five Chinese tasks need a word segmenter and are left out. Published numbers cut prompts in the middle to the model's
length, and send trec, triviaqa, samsum, lcc and repobench-p without a chat template; here nothing is cut and every task has
its template. Lookups are routed by the last lines of inputs that are more than a question.
"""

from __future__ import annotations

from functools import partial

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
    "trec": ("TREC", partial(of_first_line, metrics.label_share), 64),
    "triviaqa": ("TriviaQA", partial(of_first_line, metrics.word_f1), 32),
    "samsum": ("SAMSum", partial(of_first_line, metrics.rouge_l), 128),
    "passage_count": ("PassageCount", metrics.number_share, 32),
    "passage_retrieval_en": ("PassageRetrieval-en", metrics.number_share, 32),
    "lcc": ("LCC", metrics.code_similarity, 64),
    "repobench-p": ("RepoBench-P", metrics.code_similarity, 64),
}
TASKS = {
    name: Task(name, title, prompts("longbench")[name], metric, limit)
    for name, (title, metric, limit) in _TASKS.items()
}

#: Tasks whose `input` is no short question but code, a passage with its question, a dialogue; what routes their lookups.
_LONG_INPUTS, _ROUTED = ("repobench-p", "triviaqa", "samsum"), 300


def parse(task: Task, row: Row) -> Example:
    """A row with the published fields `context`, `input` (empty for summaries), `answers` and, for TREC, `all_classes`.

    Raises:
        DatasetError: A field is missing or of another form.
    """
    labels = row.texts("all_classes") if task.name == "trec" else ()
    text = row.text("input")
    question = _last_lines(text) if task.name in _LONG_INPUTS else text
    return task.example(row.document("context"), question, row.texts("answers"), fields={"input": text}, labels=labels)


def _last_lines(text: str) -> str:
    """The last lines that have `_ROUTED` characters together; the end of the last where it alone has more."""
    end = text.strip()[-_ROUTED:]
    whole = len(end) == len(text.strip())
    _, cut, rest = end.partition("\n")
    return end if whole or not cut else rest


SUITE = Suite(
    name="longbench",
    title="LongBench",
    tasks=TASKS,
    rules={},
    parse=parse,
    file=lambda task, _: f"{task}.jsonl",
    hub=lambda task, _: f"zip://data/{task}.jsonl::hf://datasets/THUDM/LongBench/data.zip",
)
