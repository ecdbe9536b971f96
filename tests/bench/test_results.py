"""The numbers of docs/results.md: they are those of benchmarks/results, and a slice of them comes out again."""

import json
import shutil

import pytest

from benchmarks.fill_results import DOCUMENT, RESULTS, fill
from qllm_bench import needle
from qllm_bench.harness import run
from qllm_bench.journal import Journal
from qllm_bench.prose import Library
from qllm_bench.subject import Subject

AGAIN = "make them anew: qllm bench needle --lengths 512,1k,4k --out benchmarks/results (remove needle.jsonl first)"


@pytest.fixture(scope="module")
def recorded():
    lines = [json.loads(line) for line in (RESULTS / "needle.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines[0]["subject"], {line["key"]: line for line in lines if "key" in line}


def test_document_shows_the_tables_of_the_results():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert fill(text) == text, "run `python -m benchmarks.fill_results`"
    assert (RESULTS / "needle.md").read_text(encoding="utf-8").strip() in text


def test_tables_follow_from_the_rows(tmp_path, recorded):
    shutil.copy(RESULTS / "needle.jsonl", tmp_path)
    text = needle.report(Journal(tmp_path, "needle", recorded[0]))
    assert text.strip() == (RESULTS / "needle.md").read_text(encoding="utf-8").strip()
    tables = [json.loads((folder / "needle.json").read_text(encoding="utf-8")) for folder in (tmp_path, RESULTS)]
    assert tables[0] == tables[1]


def test_a_slice_comes_out_again(tmp_path, recorded):
    """Eight questions of 1k tokens, looked up and with a window alone.

    Answers may turn where two tokens are about as likely and kernels round differently; one of the scores may.
    """
    before, rows = recorded
    subject = Subject("reader")
    library = Library(before["split"])
    plan = needle.Plan([1024], 1, *(before[name] for name in ("needles", "depths", "distractors", "families", "seed")))
    now = needle.about(subject, library, plan)
    changed = sorted(name for name in before if before[name] != now[name])
    assert not changed, f"the results are of another {', '.join(changed)}; {AGAIN}"
    settings = [subject.setting(policy) for policy in ("qllm", "streaming")]
    journal = Journal(tmp_path, "needle", now)
    run(journal, needle.jobs(subject, settings, needle.Haystacks(subject, library, plan), plan))
    assert len(journal.rows) == 2 * plan.needles
    for row in journal.rows:
        for column in ("question", "expected", "prompt_tokens", "depth", "family"):
            assert row[column] == rows[row["key"]][column]
    differing = [row["key"] for row in journal.rows if row["score"] != rows[row["key"]]["score"]]
    assert len(differing) <= 1, f"{differing} came out otherwise; {AGAIN}"
