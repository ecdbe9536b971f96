"""`qllm bench needle` and the oracle, from the command line to the figures, on the embedded reader."""

import json
import random

import pytest

from qllm_bench import needle
from qllm_bench.oracle import forced, needed_tokens
from qllm_bench.prose import Library
from qllm_bench.subject import Subject
from qllm_runtime import cli
from qllm_runtime.memory.far_context import FarContext
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Document, Turn

TINY = ("needle", "--lengths", "1k", "--documents", "1", "--needles", "2", "--distractors", "1")


def bench(*arguments):
    return cli.run(["bench", *map(str, arguments)])


def rows(folder, name="needle"):
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [line for line in lines if "key" in line]


@pytest.fixture(scope="module")
def subject():
    return Subject("reader")


def test_from_command_to_figures(tmp_path, capsys):
    assert bench(*TINY, "--policy", "qllm,oracle", "--order", "last,both", "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert "| qllm | last |" in shown.out
    assert "needle: 8/8 cases" in shown.err
    found = rows(tmp_path)
    assert len(found) == 8
    assert {(row["policy"], row["order"]) for row in found} == {
        (p, o) for p in ("qllm", "oracle") for o in ("last", "both")
    }
    assert all(800 < row["prompt_tokens"] <= 1024 and row["score"] in (0, 1) and row["output"] for row in found)
    assert [row["family"] for row in found[:2]] == ["passkey", "magic"]
    report = json.loads((tmp_path / "needle.json").read_text())
    assert (
        report["by_length"][0] | {"policy": "qllm", "order": "last", "tokens": 1024, "total": 2}
        == report["by_length"][0]
    )
    for name in ("depth", "family", "length"):
        assert (tmp_path / f"needle_{name}.png").read_bytes().startswith(b"\x89PNG")
    # more lengths and policies join what is there; nothing is asked twice
    assert bench(*TINY, "--policy", "qllm,streaming", "--order", "both", "--out", tmp_path) == 0
    assert rows(tmp_path)[:8] == found
    assert [row["policy"] for row in rows(tmp_path)[8:]] == ["streaming"] * 2


def test_rows_are_compared_with_dense_attention_within_the_window(tmp_path, monkeypatch, capsys):
    """Reading once serves the questions asked behind it, again or not, and the oracle's."""
    monkeypatch.setattr(needle.Subject, "ask", lambda self, setting, example, progress: {"score": 1.0})
    command = ("needle", "--lengths", "512,2k", "--needles", "2", "--distractors", "0", "--out", tmp_path)
    assert bench(*command, "--documents", "3,2k=1", "--policy", "qllm,infllm", "--order", "last,reread") == 0
    found = rows(tmp_path)
    assert [(row["policy"], row["order"]) for row in found if row["tokens"] == 2048] == [
        (policy, order) for policy in ("qllm", "infllm") for order in ("last", "reread") for _ in range(2)
    ]
    assert sum(row["tokens"] == 512 and row["policy"] == "full" for row in found) == 6
    report = json.loads((tmp_path / "needle.json").read_text())
    for cell in report["by_length"]:
        assert (cell["difference"] is None) == (cell["tokens"] == 512)
    assert "| +0 (-66 to +39) |" in capsys.readouterr().out


def test_readings_are_shared_by_settings_of_one_memory(subject):
    plan = needle.Plan([1024], 1, 2, 2, 0, ["magic", "code"], 0)
    settings = [
        subject.setting(p, o) for p, o in (("qllm", "last"), ("infllm", "last"), ("oracle", "last"), ("qllm", "reread"))
    ]
    found = needle.jobs(subject, settings, needle.Haystacks(subject, Library("test"), plan), plan)
    assert [job.tokens for job in found] == [1024, 64, 64, 64, 64, 64, 1024, 64]
    reads, scores = [], []
    read = subject.llm.read
    subject.llm.read = lambda *given, **options: reads.append(given) or read(*given, **options)
    try:
        scores = [job.work(lambda *_: None) for job in found]
    finally:
        del subject.llm.read
        subject.forget()
    assert len(reads) == 2 and len(scores) == 8


def test_interruption_loses_only_the_case_under_way(tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = (*TINY, "--policy", "qllm", "--order", "last,both")
    assert bench(*command, "--out", whole) == 0
    ask, calls = Subject.ask, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(Subject, "ask", interrupted)
    assert bench(*command, "--out", parts) == 130
    assert "stopped with 1 of 4 cases" in capsys.readouterr().err
    assert len(rows(parts)) == 1
    assert bench(*command, "--out", parts) == 0
    assert len(calls) == 5

    def answers(folder):
        return [(row["key"], row["output"], row["score"], row["prompt_tokens"]) for row in rows(folder)]

    assert answers(parts) == answers(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("needle", "--policy", "rag"), "Unknown policy rag; known: qllm, infllm"),
        (("needle", "--order", "middle"), "Unknown order middle"),
        (("needle", "--families", "poems"), "Unknown family poems"),
        (("needle", "--split", "training"), "Unknown split training"),
        (("needle", "--lengths", "many"), "'many' is not a length"),
        (("needle", "--lengths", "64"), "out of range"),
        (("needle", "--documents", "0"), "--documents must be at least 1"),
        (("needle", "--seed", "-1"), "Invalid value for '--seed'"),
        (
            ("needle", "--lengths", "1k", "--policy", "full"),
            "was trained for 512 tokens, so policy 'full' cannot read 1,024",
        ),
        (("needle", "--lengths", "512", "--needles", "8", "--distractors", "30"), "do not fit 512 tokens"),
        (("needle", "--needles", "9", "--families", "passkey"), "holds one pass key only"),
        (("needle", "--documents", "16k=4"), "--documents says nothing about 512, 1k, 4k"),
        (("needle", "--documents", "4,64k=2"), "not among --lengths: 64k"),
        (("needle", "--documents", "many"), "or LENGTH=NUMBER"),
        (("needle", "--policy", "oracle", "--order", "reread"), "they exclude each other"),
        (("needle", "--n-local", "1024"), "exceeds the 512 tokens"),
        (
            ("needle", "--n-local", "24", "--policy", "infllm", "--block-size", "8"),
            "the local window of 'infllm' has 24",
        ),
        (("needle", "--model", "/no/such-model"), "'/no/such-model'"),
        (("needle", "--text", "no/folder"), "is not a folder"),
        (("policies", "--sweep", "colour"), "Unknown sweep colour"),
        (("policies", "--sweep", "none"), "Nothing to compare"),
        (("policies", "--setting", "colour=red"), "colour"),
        (("policies", "--setting", "colour"), "write field=value"),
        (("policies", "--tokens", "1k,2k"), "--tokens takes one length"),
        (("speed", "--policy", "qllm,dense"), "Unknown policy dense; known: qllm, infllm, streaming, sdpa"),
        (("speed", "--device", "toaster"), "Unknown device 'toaster'"),
        (("speed", "--dtype", "int8"), "Unknown dtype 'int8'"),
        (("speed", "--model", "/no/such-model"), "'/no/such-model'"),
        (("speed", "--steps", "0"), "--steps must be at least 1"),
        (("haystack",), "haystack"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    more = () if arguments == ("haystack",) else ("--out", out)
    assert bench(*arguments, *more) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("qllm: ") and shown.err.count("\n") == 1
    assert not shown.out
    assert not out.exists()


def test_without_the_extra(monkeypatch, capsys):
    from qllm_bench import arguments

    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert bench("needle") == 2
    assert "pip install 'qllm-integrations[bench]'" in capsys.readouterr().err


def test_without_the_package(monkeypatch, capsys):
    from qllm_runtime import bench_command

    monkeypatch.setattr(bench_command, "find_spec", lambda name: None)
    assert bench("needle") == 2
    assert "pip install 'qllm-integrations[bench]'" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys):
    assert bench() == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("needle", "infinite", "policies", "speed", "rag"))


def test_every_family_comes_to_every_depth():
    plan = needle.Plan([1024], 10, 4, 4, 0, needle.SIMPLE, 0)
    pairs = {pair for n in range(10) for pair in zip(plan.families_of(n), plan.depths_of(n), strict=True)}
    assert len(pairs) == 32


def test_a_document_of_many_needles_holds_one_pass_key():
    plan = needle.Plan([16384], 2, 20, 4, 0, needle.SIMPLE, 0)
    for document in range(2):
        families = plan.families_of(document)
        assert len(families) == 20 and families.count("passkey") == 1
        assert {families.count(family) for family in needle.SIMPLE[1:]} <= {2, 3}


def test_short_documents_hold_one_needle_each():
    plan = needle.Plan([512, 4096], 3, 4, 5, 2, needle.SIMPLE, 0)
    assert plan.of_length(4096) == needle.Plan([4096], 3, 4, 5, 2, needle.SIMPLE, 0)
    near = plan.of_length(512)
    assert (near.documents, near.needles) == (12, 1)
    pairs = [[pair for n in range(p.documents) for pair in zip(p.families_of(n), p.depths_of(n), strict=True)]
             for p in (near, plan)]  # fmt: skip
    assert pairs[0] == pairs[1]


def test_order_first_puts_the_question_ahead_only(subject):
    seen = []
    chat = subject.llm.chat
    subject.llm.chat = lambda turns, **options: seen.append((turns, options)) or chat(turns, **options)
    try:
        case = needle.Haystacks(subject, Library("test"), needle.Plan([512], 1, 1, 1, 0, ["magic"], 0)).of(512, 0)[0]
        subject.ask(subject.setting("qllm", "first"), needle.example(case))
    finally:
        del subject.llm.chat
    [(turns, options)] = seen
    prompt = build_prompt(subject.llm.tokenizer, turns, query=options["query"], mode=options["mode"])
    [(start, end)] = prompt.query_spans
    assert end <= prompt.document_spans[0].start
    assert subject.llm.tokenizer.decode(prompt.ids[start:end]) == case.question


def test_oracle_sees_the_fact_in_every_lookup(subject):
    plan = needle.Plan([2048], 1, 1, 2, 0, ["code"], 3)
    [case] = needle.Haystacks(subject, Library("test"), plan).of(2048, 0)
    llm, memory = subject.llm, subject.setting("oracle").memory.replace(topk=2)
    llm.memory = memory
    turns = [Turn("user", (Document(case.document), case.question))]
    prompt = build_prompt(llm.tokenizer, turns, query=case.question, mode="query_aware")
    tokens = needed_tokens(prompt, case.spans)
    said = llm.tokenizer.decode(prompt.ids[tokens[0] : tokens[-1] + 1])
    assert case.values[0] in said
    wanted = {(t - memory.n_init) // memory.block_size for t in tokens if t >= memory.n_init}
    original, seen = FarContext.look_up, []
    with forced(tokens, memory):
        llm.ask(case.question, case.document, max_tokens=2, on_lookup=lambda _, record: seen.append(record))
    assert FarContext.look_up is original
    assert seen and wanted and len(wanted) <= memory.topk
    for record in seen:
        chosen = record.ids.tolist()
        assert sorted(set(chosen)) == chosen and len(chosen) == min(memory.topk, record.n_blocks)
        assert {block for block in wanted if block < record.n_blocks} <= set(chosen)


def test_oracle_answers_at_least_as_well_as_a_blind_window(subject):
    rng = random.Random(0)
    plan = needle.Plan([2048], 1, 4, 4, 0, ["code", "magic", "place", "job"], rng.randrange(9))
    cases = needle.Haystacks(subject, Library("test"), plan).of(2048, 0)
    right = {}
    for policy in ("oracle", "streaming"):
        setting = subject.setting(policy, "last", n_local=128, topk=4)
        scores = [subject.ask(setting, needle.example(case, reading=f"{policy}")) for case in cases]
        right[policy] = sum(row["score"] for row in scores)
    assert right["oracle"] >= right["streaming"]
