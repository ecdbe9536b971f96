"""Resuming, scores, arguments, prose and documents: what every benchmark stands on."""

import json
import math
import random
import subprocess
import sys

import pytest

from qllm_bench import arguments, environment
from qllm_bench.harness import Job, run
from qllm_bench.journal import Journal
from qllm_bench.prose import Library
from qllm_bench.questions.facts import FAMILIES
from qllm_bench.questions.haystack import make_haystack
from qllm_bench.scores import cells, difference, summarise
from qllm_runtime.errors import DocumentError, InvalidRequestError

SUBJECT = {"model": "m", "weights": "0"}


def jobs(names, done, fail=None):
    def work(name, progress):
        if name == fail:
            raise KeyboardInterrupt
        progress(5, 10)
        done.append(name)
        return {"score": 1.0}

    return [Job(name, {"policy": name}, 10, lambda progress, name=name: work(name, progress)) for name in names]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, capsys):
    done = []
    journal = Journal(tmp_path, "x", SUBJECT)
    with pytest.raises(KeyboardInterrupt):
        run(journal, jobs("abcd", done, fail="c"))
    assert done == ["a", "b"]
    assert "stopped with 2 of 4 cases" in capsys.readouterr().err
    with journal.path.open("a") as file:  # a line that was cut off by a power failure
        file.write('{"key": "c", "sco')
    again = Journal(tmp_path, "x", SUBJECT)
    assert [row["key"] for row in again.rows] == ["a", "b"]
    run(again, jobs("abcd", done))
    assert done == ["a", "b", "c", "d"]
    assert "2 of 4 cases are done already" in capsys.readouterr().err
    rows = [json.loads(line) for line in journal.path.read_text().splitlines()[1:]]
    assert [(row["key"], row["policy"], row["score"]) for row in rows] == [(k, k, 1.0) for k in "abcd"]
    run(Journal(tmp_path, "x", SUBJECT), jobs("abcd", done))
    assert len(done) == 4


def test_two_jobs_of_one_name_are_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="'a'"):
        run(Journal(tmp_path, "x", SUBJECT), jobs("aa", []))


def test_results_of_other_weights_are_not_mixed(tmp_path):
    run(Journal(tmp_path, "x", SUBJECT), jobs("a", []))
    with pytest.raises(InvalidRequestError, match=r"weights='0' \(now '1'\).*--out"):
        Journal(tmp_path, "x", {**SUBJECT, "weights": "1"})


@pytest.mark.parametrize("content", ["hello\n", '{"key": "a"}\n', '{"subject": {}}\n[1]\n', "\x00\n", "hello", '{"ke'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DocumentError, match="not a journal"):
        Journal(tmp_path, "x", {})
    assert path.read_text() == content


def test_a_first_line_that_was_cut_off_is_written_again(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"subject": {"mod')
    assert Journal(tmp_path, "x", SUBJECT).rows == []
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"subject": SUBJECT}


def test_a_row_that_stands_twice_counts_once(tmp_path):
    journal = Journal(tmp_path, "x", SUBJECT)
    for score in (1.0, 0.0):
        journal.append({"key": "a", "score": score})
    assert Journal(tmp_path, "x", SUBJECT).rows == [{"key": "a", "score": 1.0}]


def test_one_process_at_a_time_has_a_journal(tmp_path):
    command = [
        sys.executable, "-c", "import sys; from pathlib import Path; from qllm_bench.journal import Journal\n"
        f"Journal(Path(sys.argv[1]), 'x', {SUBJECT!r})", str(tmp_path),
    ]  # fmt: skip
    journal = Journal(tmp_path, "x", SUBJECT)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode and "is being written by another process" in refused.stderr
    del journal
    assert subprocess.run(command, check=False).returncode == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DocumentError, match="Cannot keep results"):
        Journal(tmp_path / "file", "x", {})


def test_the_engine_is_all_that_answers_hang_on():
    names = {"/".join(path.parts[-2:]) for path in environment._sources()}
    for name in ("qllm_runtime/layout.py", "memory/block.py", "questions/facts.py", "published/prompts.toml"):
        assert name in names


def test_results_of_another_engine_are_told(tmp_path, capsys, monkeypatch):
    for engine, told in (("a", False), ("a", False), ("b", True)):
        monkeypatch.setattr(environment, "_engine", lambda engine=engine: engine)
        journal = Journal(tmp_path, "x", SUBJECT)
        journal.begin({})
        run(journal, jobs("ab", []))
        assert ("before the engine or its questions changed" in capsys.readouterr().err) is told


def test_report_says_what_when_and_where(tmp_path):
    journal = Journal(tmp_path, "x", SUBJECT)
    journal.begin({"lengths": [512]})
    report = json.loads(journal.report(table=[1]).read_text())
    assert report["subject"] == SUBJECT
    assert report["table"] == [1]
    [start] = report["runs"]
    assert start["arguments"] == {"lengths": [512]}
    assert {"torch", "transformers", "python"} <= set(start["versions"])
    assert {"cpu", "threads", "system"} <= set(start["hardware"])
    assert start["date"].endswith("Z")


def test_wilson_interval():
    """Brown, Cai and DasGupta 2001: centre and half width written out for 8 of 10."""
    found = summarise([1.0] * 8 + [0.0] * 2)
    z, n, p = 1.96, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["right"] == 8
    assert found["interval"] == pytest.approx([centre - half, centre + half], abs=1e-4)
    assert summarise([0.0, 0.0])["interval"][0] == 0
    assert summarise([1.0])["interval"][1] == 1


def test_interval_of_shares():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(400)]
    found = summarise(scores)
    mean, error = sum(scores) / 400, math.sqrt(1 / 12 / 400)
    assert found["share"] == pytest.approx(mean, abs=1e-4)
    low, high = found["interval"]
    assert low < mean - 1.96 * error < mean + 1.96 * error < high
    assert high - low < 2 * 1.96 * math.sqrt(0.25 / 400) + 1e-4  # no scores vary more than those of 0 and 1


@pytest.mark.parametrize("scores", [[0.37], [0.5] * 8])
def test_few_or_equal_shares_are_not_certain(scores):
    low, high = summarise(scores)["interval"]
    assert low < scores[0] - 0.2 and high > scores[0] + 0.2


def test_interval_of_a_difference():
    """Newcombe (1998), table II, row (a), method 10: 56/70 against 48/80."""
    found = difference(summarise([1] * 56 + [0] * 14), summarise([1] * 48 + [0] * 32))
    assert found["share"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.0524, 0.3339], abs=2e-4)


def test_cells_group_rows():
    rows = [{"policy": p, "tokens": n, "score": s} for p, n, s in (("a", 1, 1), ("b", 1, 0), ("a", 1, 0), ("a", 2, 1))]
    assert [(c["policy"], c["tokens"], c["right"], c["total"]) for c in cells(rows, ("policy", "tokens"))] == [
        ("a", 1, 1, 2), ("b", 1, 0, 1), ("a", 2, 1, 1),
    ]  # fmt: skip


def test_lengths():
    assert arguments.lengths("1M, 4k,512,1.5k,4096") == [512, 1536, 4096, 1048576]
    assert [arguments.short(n) for n in (512, 1536, 4096, 1048576)] == ["512", "1536", "4k", "1M"]
    for text in ("", "4x", "k", "100", "99M", "-4k", "nan", "inf"):
        with pytest.raises(InvalidRequestError):
            arguments.lengths(text)


def test_numbers_by_length():
    assert arguments.by_length("4", [512, 1024], "--documents") == {512: 4, 1024: 4}
    assert arguments.by_length("4,1k=25", [512, 1024], "--documents") == {512: 4, 1024: 25}
    assert arguments.by_length("1k=2,512=1", [512, 1024], "--documents") == {512: 1, 1024: 2}


def test_choices():
    assert arguments.choices("b,a,b", "abc", "letter") == ["b", "a"]
    assert arguments.choices("all", "abc", "letter") == ["a", "b", "c"]
    with pytest.raises(InvalidRequestError, match="Unknown letter d; known: a, b, c"):
        arguments.choices("a,d", "abc", "letter")


def test_splits_share_no_prose(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"Book {number} has a sentence. And another one.\r\n\r\nThe end.")
    sides = [{b.text for b in Library(split, tmp_path)._books} for split in ("development", "test")]
    assert all(sides) and not sides[0] & sides[1]
    (tmp_path / "emma.txt").write_text("Emma was held out.")
    assert {b.text for b in Library("test", tmp_path)._books} == {"Emma was held out."}
    assert Library("test", tmp_path).name == Library("development", tmp_path).name
    before = Library("test", tmp_path).name
    (tmp_path / "0.txt").write_text("Another edition.")
    assert Library("test", tmp_path).name != before
    stories = [Library(split).draw(random.Random(0), 3000).text for split in ("development", "test")]
    assert len(stories[0]) >= 3000 and stories[0] != stories[1]
    assert stories[0] == Library("development").draw(random.Random(0), 3000).text


@pytest.mark.parametrize("wrong", ["missing", "empty", "binary"])
def test_wrong_prose(tmp_path, wrong):
    if wrong == "binary":
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x80")
    folder = tmp_path / "no" if wrong == "missing" else tmp_path
    with pytest.raises(DocumentError, match=str(tmp_path)):
        Library("test", folder)


def test_haystack_holds_every_fact_at_its_depth():
    families = [family for family in FAMILIES if family != "absent"]
    depths = [n / (len(families) - 1) for n in range(len(families))]
    prose = Library("test").draw(random.Random(0), 40_000)
    cases, again = (make_haystack(random.Random(1), prose, 40_000, families, depths, 2) for _ in range(2))
    assert cases == again
    assert len({case.document for case in cases}) == 1
    for case, family, depth in zip(cases, families, depths, strict=True):
        said = " ".join(case.document[a:b] for a, b in case.spans)
        assert case.family == family
        assert all(value.lower() in said.lower() for value in case.values)
        assert case.spans[0][0] / len(case.document) == pytest.approx(depth, abs=0.05)


def test_no_question_of_a_haystack_has_two_answers():
    prose = Library("test").draw(random.Random(0), 4_000)
    for seed in range(40):
        cases = make_haystack(random.Random(seed), prose, 4_000, ["place"] * 6, [0.5] * 6, 3)
        statements = [cases[0].document[a:b] for case in cases for a, b in case.spans]
        who = [statement.split(" lives in ")[0] for statement in statements]
        assert len(set(who)) == len(who)
