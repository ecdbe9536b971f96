"""`qllm bench infinite` from the command line: tasks by rule, published files, resuming, bad input."""

import inspect
import json
from dataclasses import replace
from functools import partial

import pytest

from qllm_bench import infinite_command, published
from qllm_bench.infinite import latest, means, report
from qllm_bench.journal import Journal
from qllm_bench.published import metrics, versions
from qllm_bench.published.example import Example
from qllm_bench.scores import cells, summarise
from qllm_bench.subject import Example as Case
from qllm_bench.subject import Setting
from qllm_runtime.cli import run
from qllm_runtime.config import MemoryConfig
from qllm_runtime.layout import lay_out


def bench(*arguments):
    return run(["bench", "infinite", *map(str, arguments)])


def rows(path):
    return [row for row in map(json.loads, path.read_text().splitlines()) if "key" in row]


def test_tasks_by_rule_are_answered_reported_and_resumed(tmp_path, capsys):
    common = ("--task", "passkey,kv_retrieval", "--lengths", "400", "--policy", "qllm,oracle", "--out", tmp_path)
    assert bench(*common, "--questions", 1) == 0
    first = rows(tmp_path / "infinite.jsonl")
    assert [(row["task"], row["policy"]) for row in first] == [
        ("passkey", "qllm"), ("passkey", "oracle"), ("kv_retrieval", "qllm"), ("kv_retrieval", "oracle"),
    ]  # fmt: skip
    assert all(200 < row["prompt_tokens"] <= 400 for row in first)
    assert first[0]["score"] == 1 and first[0]["expected"] in first[0]["output"]
    assert bench(*common, "--questions", 2) == 0
    assert rows(tmp_path / "infinite.jsonl")[:4] == first
    report = json.loads((tmp_path / "infinite.json").read_text())
    assert report["cases"] == 8 and report["subject"]["suite"] == "infinite"
    assert {c["total"] for c in report["by_task"]} == {2}
    assert (tmp_path / "infinite.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "4 of 8 cases are done already" in err and "| passkey | qllm | both |" in out


def test_files_are_answered_with_their_own_metric(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    text = "It rained all day in the harbour. Ann went home at last."
    (data / "hotpotqa.jsonl").write_text(
        json.dumps({"context": text, "input": "Who went home?", "answers": ["Ann"], "all_classes": None}) + "\n"
    )
    (data / "gov_report.jsonl").write_text(
        json.dumps({"context": text, "input": "", "answers": ["It rained."], "all_classes": None}) + "\n"
    )
    out = tmp_path / "out"
    arguments = (
        "--suite",
        "longbench",
        "--task",
        "hotpotqa,gov_report",
        "--data",
        data,
        "--policy",
        "qllm",
        "--out",
        out,
    )
    assert bench(*arguments) == 0
    found = {row["task"]: row for row in rows(out / "longbench.jsonl")}
    assert set(found) == {"hotpotqa", "gov_report"}
    assert all(0 <= row["score"] <= 1 and row["tokens"] == 0 for row in found.values())
    assert found["hotpotqa"]["question"] == "Who went home?" and found["hotpotqa"]["expected"] == "Ann"
    # another text under the same name is another case
    (data / "hotpotqa.jsonl").write_text(
        json.dumps({"context": text * 2, "input": "Who went home?", "answers": ["Ann"], "all_classes": None}) + "\n"
    )
    assert bench(*arguments) == 0
    assert len(rows(out / "longbench.jsonl")) == 3
    report = json.loads((out / "longbench.json").read_text())
    assert report["cases"] == 2 and {c["total"] for c in report["by_task"]} == {1}


def test_babilong_has_a_file_per_length(tmp_path):
    path = tmp_path / "data" / "data" / "qa1" / "1k.json"
    path.parent.mkdir(parents=True)
    row = {"input": "Mary went to the office. It rained.", "question": "Where is Mary?", "target": "office"}
    path.write_text(json.dumps([row]))
    arguments = ("--suite", "babilong", "--task", "qa1", "--data", tmp_path / "data", "--policy", "qllm")
    assert bench(*arguments, "--lengths", "1k", "--out", tmp_path / "out") == 0
    assert [row["tokens"] for row in rows(tmp_path / "out" / "babilong.jsonl")] == [1024]


def test_the_shortest_and_longest_files_of_babilong_can_be_asked_for(tmp_path):
    folder = tmp_path / "data" / "data" / "qa1"
    folder.mkdir(parents=True)
    row = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    for name in ("0k", "10M"):
        (folder / f"{name}.json").write_text(json.dumps([row]))
    arguments = ("--suite", "babilong", "--task", "qa1", "--data", tmp_path / "data", "--policy", "qllm")
    assert bench(*arguments, "--lengths", "0,10M", "--out", tmp_path / "out") == 0
    assert "| task | policy | order | 0k | 10M |" in (tmp_path / "out" / "babilong.md").read_text()


def test_the_folder_may_be_named_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "hotpotqa.jsonl").write_text(
        json.dumps({"context": "Ann went home.", "input": "Who?", "answers": ["Ann"]})
    )
    common = ("--suite", "longbench", "--task", "hotpotqa", "--policy", "qllm", "--out", tmp_path / "out")
    assert bench(*common, "--data", tmp_path) == 0
    monkeypatch.chdir(tmp_path)
    assert bench(*common, "--data", ".") == 0
    assert len(rows(tmp_path / "out" / "longbench.jsonl")) == 1


def laid_out(case, order):
    setting = Setting("qllm", MemoryConfig(), order)
    messages = lay_out(case.turns(order), case.question, case.mode(setting))
    return [(message.role, "".join(segment.text for segment in message.segments)) for message in messages]


def test_the_whole_closing_stands_ahead_where_the_question_does_alone():
    case = Case("A book.", "Who?", "B", float, closing="Question: Who?\nA. Ann\nB. Bob", system="Read the book.")
    assert laid_out(case, "first") == [("system", "Read the book."), ("user", case.closing), ("user", "A book.")]
    assert laid_out(case, "last")[1:] == [("user", f"A book.\n\n{case.closing}")]
    assert laid_out(case, "both")[1:] == [("user", f"Who?\n\nA book.\n\n{case.closing}")]
    assert laid_out(replace(case, closing=None), "first")[1:] == [("user", "Who?\n\nA book.")]


def test_the_end_of_a_prompt_that_asks_nothing_stays_behind_the_text():
    case = Case("x = 1", "Next line of code:", "y", float, system="Complete the code.", leads=False)
    assert laid_out(case, "both") == laid_out(case, "last") == [
        ("system", "Complete the code."), ("user", "x = 1\n\nNext line of code:")
    ]  # fmt: skip
    assert laid_out(case, "first")[1:] == [("user", "Next line of code:\n\nx = 1")]


def test_rows_of_another_rule_are_asked_again_and_left_out(tmp_path, monkeypatch):
    common = ("--task", "passkey", "--lengths", "400", "--policy", "qllm", "--questions", 1, "--out", tmp_path)
    journal = tmp_path / "infinite.jsonl"
    assert bench(*common) == 0
    [first] = rows(journal)
    plain = json.dumps(first).replace(first["key"], first["key"].rpartition("/")[0])
    journal.write_text(journal.read_text().replace(json.dumps(first, ensure_ascii=False), plain))
    assert bench(*common) == 0  # the row of before there were versions
    assert [row["key"] for row in rows(journal)] == [first["key"].rpartition("/")[0], first["key"]]
    assert json.loads((tmp_path / "infinite.json").read_text())["cases"] == 1
    suite = published.SUITES["infinite"]
    task = replace(suite.tasks["passkey"], metric=metrics.contains_value)
    monkeypatch.setitem(suite.tasks, "passkey", task)
    versions.of_rule.cache_clear()
    assert bench(*common) == 0
    versions.of_rule.cache_clear()
    assert len({row["key"] for row in rows(journal)}) == 3
    subject = json.loads(journal.read_text().splitlines()[0])["subject"]
    text = report(Journal(tmp_path, "infinite", subject))
    assert json.loads((tmp_path / "infinite.json").read_text())["cases"] == 1 and ", 1) |" in text


def test_rows_without_versions_are_shown_as_long_as_there_are_no_others():
    old = [{"key": f"qllm/last/{task}/400/0", "task": task} for task in ("passkey", "math_find")]
    assert latest(old) == old
    new = {"key": "qllm/last/passkey/4096/0/0123abcd", "task": "passkey"}
    assert latest([*old, new]) == [old[1], new]


def test_versions_change_with_everything_that_makes_a_row(monkeypatch):
    example = Example("qa", "Read.", "A book.", "Question: Who?", "Who?", ("Ann",), 8)
    others = [
        replace(example, instruction="Read it."), replace(example, document="A book"), replace(example, closing="Who?"),
        replace(example, question="Question"), replace(example, answers=("Anne",)), replace(example, max_tokens=9),
    ]  # fmt: skip
    found = [versions.of_question(one, metrics.chosen_option) for one in (example, *others)]
    found.append(versions.of_question(example, metrics.named_speaker))
    found.append(versions.of_question(example, partial(metrics.of_first_line, metrics.chosen_option)))
    monkeypatch.setattr(metrics, "_LETTERS", "ABC")  # which the metric names
    found.append(versions.of_question(example, metrics.chosen_option))
    assert len(set(found)) == len(found)
    for suite in (published.SUITES["infinite"], published.SUITES["ruler"]):
        assert len({versions.of_rule(suite, task) for task in suite.rules}) == len(suite.rules)


def test_versions_are_of_what_a_metric_does_and_not_of_its_words(monkeypatch):
    example = Example("qa", "Read.", "A book.", "Question: Who?", "Who?", ("Ann",), 8)
    real = inspect.getsource

    def of_source(old, new):
        assert old in real(metrics.word_f1) + real(metrics._f1)
        monkeypatch.setattr(inspect, "getsource", lambda function: real(function).replace(old, new))
        return versions.of_question(example, metrics.word_f1)

    before = versions.of_question(example, metrics.word_f1)
    assert of_source('"""F1 of words', '"""Share of words named_speaker') == before
    assert of_source("    return max(", "    # the best one\n\n    return max(  ") == before
    assert of_source("(output: str, example: Example) -> float", "(output, example)") == before
    assert of_source("if same else 0.0", "if same else 0.5") != before  # in a function that the metric calls


def test_the_mean_weighs_tasks_alike_and_is_of_the_same_tasks_everywhere():
    def scored(policy, task, scores):
        return [{"policy": policy, "order": "last", "task": task, "tokens": 0, "score": float(s)} for s in scores]

    found = [*scored("qllm", "a", [1] * 90), *scored("qllm", "b", [0] * 10), *scored("infllm", "a", [1, 0])]
    [overall] = means(cells(found, ("policy", "order", "task", "tokens")))
    assert (overall["policy"], overall["share"], overall["total"]) == ("qllm", 0.5, 100)
    low, high = overall["interval"]
    assert 0.4 < low < 0.49 and 0.6 < high < 0.7
    [alone] = means(cells(found[:90], ("policy", "order", "task", "tokens")))
    assert alone["interval"] == summarise([1] * 90)["interval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "passkeys"), "Unknown task passkeys; known: passkey, number_string"),
        (("--suite", "all"), "One suite is taken at a time, not 'all'"),
        (("--suite", "ruler,infinite"), "One suite is taken at a time, not 'ruler,infinite'"),
        (("--suite", "scrolls"), "Unknown suite scrolls; known: infinite, longbench, babilong, ruler"),
        (("--policy", "h2o"), "Unknown policy h2o"),
        (("--lengths", "many"), "'many' is not a length"),
        (("--lengths", ""), "No length was given"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--task", "longbook_qa_eng"), "longbook_qa_eng cannot be made by rule (of ∞-Bench: passkey, number_string, "),
        (("--suite", "longbench"), "give the folder of the published files with --data"),
        (("--data", "/nowhere"), "'/nowhere' is not a folder"),
        (("--suite", "longbench", "--data", ".", "--lengths", "4k"), "leave --lengths out"),
        (("--suite", "ruler", "--task", "qa_1", "--data", "hub"), "publishes no files for qa_1"),
        (("--questions", "0"), "--questions must be at least 1"),
        (("--lengths", "4k", "--policy", "full"), "was trained for 512 tokens, so policy 'full' cannot read 4,096"),
        (("--task", "kv_retrieval", "--n-local", "32"), "the local window of 'qllm' has 32; raise --n-local"),
        (("--suite", "ruler", "--task", "cwe", "--lengths", "512"), "RULER cwe needs at least"),
        (("--suite", "babilong", "--data", ".", "--lengths", "16M"), "out of range: 0 to 10,485,760"),
        (("--task", "math_find", "--policy", "oracle"), "leave policy 'oracle' out"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, arguments, message):
    assert bench(*arguments, "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("passkey", {"context": " ", "answer": ["12345"]}, "field 'context', the text the question is about, is empty"),
        (
            "passkey",
            {"context": "a", "answer": ["n/a"]},
            "field 'answer' holds 'n/a', the task's answers are whole numbers",
        ),
        (
            "math_find",
            {"context": "a", "answer": ["n/a"]},
            "field 'answer' holds 'n/a', the task's answers are numbers",
        ),
        ("math_calc", {"context": "a", "answer": ["[1, 2]"]}, "the task's answers are whole numbers"),
        ("code_run", {"context": "a", "answer": "x"}, "the task's answers are whole numbers"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path, capsys, task, row, message):
    row = {"input": "The largest number, func_1(2)", **row}
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    assert bench("--task", task, "--data", tmp_path, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_the_longest_question_is_measured_before_the_first_is_asked(tmp_path, capsys):
    questions = ("Who went home?", "Who, of all the people in the harbour, went home? " * 40)
    lines = [json.dumps({"context": "Ann went home.", "input": q, "answers": ["Ann"]}) for q in questions]
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join(lines))
    common = ("--suite", "longbench", "--task", "hotpotqa", "--data", tmp_path, "--out", tmp_path / "out")
    assert bench(*common, "--policy", "qllm") == 2
    assert "raise --n-local" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_more_than_a_question_route_by_their_last_lines(tmp_path):
    code = "\n".join(f"value_{n} = other_{n}(first, second)" for n in range(200))
    row = {"context": "def first():\n    return 1", "input": code, "answers": ["x = 1"]}
    (tmp_path / "repobench-p.jsonl").write_text(json.dumps(row))
    common = ("--suite", "longbench", "--task", "repobench-p", "--data", tmp_path, "--out", tmp_path / "out")
    assert bench(*common, "--policy", "qllm") == 0
    [row] = rows(tmp_path / "out" / "longbench.jsonl")
    assert code.endswith(row["question"]) and row["question"].startswith("value_") and len(row["question"]) <= 300
    assert row["prompt_tokens"] > 1000


def test_a_text_longer_than_dense_attention_reads_is_refused_with_its_prompt(tmp_path, capsys):
    row = {"context": "Ann went home.", "input": "What did they say? " * 200, "answers": ["Ann"]}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row))
    common = ("--suite", "longbench", "--task", "hotpotqa", "--data", tmp_path, "--out", tmp_path / "out")
    assert bench(*common, "--policy", "full") == 2
    assert "policy 'full' cannot read" in capsys.readouterr().err


def test_default_lengths_of_ruler_hold_its_tasks():
    assert infinite_command._lengths(published.SUITES["ruler"], None, None) == [4096, 16384]
    assert infinite_command._lengths(published.SUITES["infinite"], None, None) == [1024, 4096, 16384]


def test_a_wrong_line_is_named(tmp_path, capsys):
    (tmp_path / "passkey.jsonl").write_text('{"context": "a", "input": "b", "answer": "1"}\n{"context": "a"}\n')
    assert bench("--task", "passkey", "--data", tmp_path, "--out", tmp_path / "out") == 2
    assert "passkey.jsonl, line 2: field 'input' is missing" in capsys.readouterr().err
