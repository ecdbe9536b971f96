"""`qllm bench policies` from the command line to the figures, and its sweeps, on the embedded reader."""

import json

import pytest

from qllm_bench import figures, policies
from qllm_bench.journal import Journal
from qllm_bench.needle import Plan
from qllm_bench.prose import Library
from qllm_bench.scores import summarise
from qllm_bench.subject import Subject
from qllm_bench.sweeps import BASE, SWEEPS, fitting, identity, sweep
from qllm_runtime import cli
from qllm_runtime.errors import QLLMError

TINY = ("--tokens", "1k", "--documents", "1", "--needles", "1", "--distractors", "1")


@pytest.fixture(scope="module")
def subject():
    return Subject("reader")


def test_from_command_to_figures(tmp_path, capsys):
    command = ["bench", "policies", *TINY, "--sweep", "selection", "--setting", "query_weight=2,order=last"]
    assert cli.run([*command, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "| selection | development, 1 document | test, 1 document |",
        "| per_kv_head |",
        "| query_weight=2,order=last |",
        policies.WITHIN,
    ):
        assert text in shown
    report = json.loads((tmp_path / "policies.json").read_text())
    assert {row["setting"] for row in report["sweeps"]["selection"]} == {BASE, "shared", "per_kv_head"}
    base, shared, _ = report["sweeps"]["selection"]
    assert (shared["id"], shared["test"]) == (base["id"], base["test"])  # the same setting is asked once
    assert report["within"]["test"]["total"] == report["within"]["development"]["total"] == 1
    assert (tmp_path / "policies_settings.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "policies.jsonl").read_text().splitlines()
    assert cli.run([*command, "--out", str(tmp_path)]) == 0
    again = (tmp_path / "policies.jsonl").read_text().splitlines()
    assert [line for line in again if '"key"' in line] == [line for line in lines if '"key"' in line]


def test_sweeps_keep_the_attention_budget(subject):
    base = subject.base
    for name, settings in sweep(subject, list(SWEEPS), "both").items():
        for label, setting in settings:
            memory = setting.memory
            if name == "budget" and label != BASE:
                assert memory.window == int(label.split(", ")[1]), label
            elif memory.policy in ("streaming", "lm-infinite"):
                assert memory.window == min(base.window, subject.trained_length), label
            else:
                assert memory.window == base.window, label
            assert memory.n_local <= subject.trained_length
    sizes = {setting.memory.block_size for _, setting in sweep(subject, ["block_size"], "both")["block_size"]}
    assert len(sizes) >= 4


def test_budgets_that_cannot_hold_a_question_are_left_out(subject, tmp_path, capsys, monkeypatch):
    sweeps = sweep(subject, ["selection", "budget"], "both")
    kept, narrow = fitting(sweeps, 65)
    assert narrow == [128]
    assert kept["selection"] == sweeps["selection"]
    assert kept["budget"] == [pair for pair in sweeps["budget"] if not pair[0].endswith(" 128")]
    assert fitting(sweeps, 64) == (sweeps, [])
    monkeypatch.setattr(policies.Haystacks, "check", lambda stacks: 79)
    monkeypatch.setattr(policies, "run", lambda journal, jobs: None)
    monkeypatch.setattr(policies, "report", lambda journal: "")
    plan = Plan([256], documents=1, needles=1, depths=1, distractors=0, families=["magic"], seed=0)
    small = subject.setting("qllm", n_local=64, topk=2)
    policies.bench(subject, [Library("test")], plan, {"budget": [*sweeps["budget"]]}, tmp_path)
    assert "budgets of 128 tokens are left out" in capsys.readouterr().err
    with pytest.raises(QLLMError, match="raise --n-local"):
        policies.bench(subject, [Library("test")], plan, {"own": [(BASE, small)]}, tmp_path)


def test_identity_changes_with_everything_but_the_name(subject):
    settings = [
        subject.setting("qllm"), subject.setting("qllm", "last"), subject.setting("oracle"), subject.setting("infllm"),
        subject.setting("qllm", query_weight=3.5),
    ]  # fmt: skip
    assert len({identity(setting) for setting in settings}) == 5
    assert identity(subject.setting("qllm", name="other")) == identity(settings[0])


@pytest.mark.parametrize(
    "text", ["policy=rag", "order=middle", "topk=-1", "topk=many", "nonsense=1", "topk", "summary=[mean", "topk=a: b"]
)
def test_own_settings_are_checked(subject, text):
    with pytest.raises(QLLMError):
        sweep(subject, [], "both", [text])


def test_a_setting_that_is_the_reference_is_asked_once(tmp_path):
    command = ["bench", "policies", "--tokens", "256", *TINY[2:], "--sweep", "none", "--split", "test"]
    assert cli.run([*command, "--setting", "policy=full", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "policies.json").read_text())["cases"] == 2


def test_one_order_is_taken(tmp_path, capsys):
    assert cli.run(["bench", "policies", "--order", "last,first", "--out", str(tmp_path / "out")]) == 2
    assert "One order is taken at a time, not 'last,first'" in capsys.readouterr().err


def test_results_of_another_order_are_refused(subject, tmp_path):
    journal = Journal(tmp_path, "policies", {})
    first, last = (sweep(subject, [], order, ["topk=4"]) for order in ("first", "last"))
    policies._check_order(journal, first)
    names = {name: [[label, identity(setting)] for label, setting in named] for name, named in first.items()}
    journal.begin({"sweeps": names, policies.WITHIN: "c"})
    policies._check_order(journal, first)
    with pytest.raises(QLLMError, match=r"holds results of --order first \(now last\).*--out"):
        policies._check_order(journal, last)


def test_colours_follow_the_split(tmp_path, monkeypatch):
    drawn = {}

    def save(plt, figure, path):
        for axis in figure.axes:
            for line in axis.lines:
                if not line.get_label().startswith("_"):
                    drawn.setdefault(line.get_label(), set()).add(line.get_color())
        drawn["legend"] = [text.get_text() for text in figure.legends[0].get_texts()]
        plt.close(figure)
        return path

    monkeypatch.setattr(figures, "_save", save)
    some = summarise([1, 0])
    rows = [("a", {"test": some}), ("b", {"development": some, "test": some})]
    figures.intervals(tmp_path / "x.png", {"own": rows}, ["development", "test"])
    assert drawn == {
        "development": {figures._COLOURS[0]},
        "test": {figures._COLOURS[1]},
        "legend": ["development", "test"],
    }


def test_won_and_lost_count_the_same_questions(tmp_path):
    journal = Journal(tmp_path, "policies", {})
    sweeps = {"own": [[BASE, "a"], ["other", "b"]], "budget": [[BASE, "a"], ["qllm, 256", "b"], ["qllm, 512", "a"]]}
    journal.begin({"sweeps": sweeps, policies.WITHIN: "c"})
    scores = {"a": (1, 1, 0, 0), "b": (0, 1, 1, 1), "c": (1, 1, 1, 1)}
    for name, found in scores.items():
        for number, score in enumerate(found):
            labels = {"setting": name, "tokens": 1024, "split": "test", "family": "magic"}
            journal.append({"key": f"{name}/1024/test/{number}/0", **labels, "score": float(score)})
    text = policies.report(journal)
    assert "| other | 0.75 (0.30-0.95, 4) | 2, 1 |" in text
    assert f"| {BASE} | 0.50 (0.15-0.85, 4) | 0, 0 |" in text
    assert f"| {policies.WITHIN} | 1.00" in text
    assert (tmp_path / "policies_budget.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_code_knows_the_question_first(subject):
    for order, expected in (("last", "both"), ("both", "both"), ("first", "first")):
        found = dict(sweep(subject, ["policy"], order)["policy"])
        assert (found["faithful"].order, found["qllm"].order) == (expected, order)


def test_infllm_is_swept_as_qllm_is(subject):
    found = sweep(subject, ["block_size", "piece", "policy"], "last")
    for name in ("block_size", "piece"):
        settings = dict(found[name])
        own = {
            label: setting for label, setting in settings.items() if label != BASE and not label.startswith("infllm")
        }
        for label, setting in own.items():
            assert settings[f"infllm, {label}"].memory == setting.memory.replace(policy="infllm")
        assert len(settings) == 2 * len(own) + 1
    published = dict(found["policy"])["infllm, faithful"].memory
    assert (published.policy, published.faithful, published.summary, published.repr_topk) == (
        "infllm",
        True,
        "published",
        4,
    )


def test_infllm_as_published_answers_a_question_it_did_not_know(tmp_path):
    changes = "policy=infllm,faithful=true,selection=shared,summary=published,repr_topk=4"
    command = [
        "bench",
        "policies",
        *TINY,
        "--split",
        "test",
        "--sweep",
        "none",
        "--setting",
        changes,
        "--order",
        "last",
    ]
    assert cli.run([*command, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "policies.json").read_text())["sweeps"]["own"][1]["test"]["total"] == 1
