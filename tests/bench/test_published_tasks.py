"""Tasks of published benchmarks: made by rule, and read from files of the published form."""

import json
import random
import re

import pytest

from qllm_bench.published import babilong, infinite, longbench, ruler
from qllm_bench.published.example import DatasetError, Row
from qllm_bench.published.suite import LengthError

SUITES = (infinite.SUITE, longbench.SUITE, babilong.SUITE, ruler.SUITE)


def count(text):
    """A token per word and per digit or sign."""
    return len(re.findall(r"[A-Za-z]+|\S", text))


def length(example):
    return sum(map(count, (example.instruction, example.document, example.closing, example.question)))


RULES = [(suite, task) for suite in SUITES for task in suite.rules]


@pytest.mark.parametrize(("suite", "task"), RULES, ids=lambda x: getattr(x, "name", x))
def test_rules_fill_the_length_and_repeat(suite, task):
    for n_tokens in (6_000, 30_000):
        example = suite.make(task, 3, n_tokens, count)
        assert 0.9 * n_tokens < length(example) <= n_tokens
        assert example == suite.make(task, 3, n_tokens, count)
        assert example.document != suite.make(task, 4, n_tokens, count).document
        assert example.question in example.closing
        if task != "math_find":
            assert all(answer in example.document for answer in example.answers)
    metric = suite.tasks[task].metric
    assert metric(" ".join(example.answers), example) == 1
    assert metric("I do not know.", example) == 0


@pytest.mark.parametrize(("suite", "task"), RULES, ids=lambda x: getattr(x, "name", x))
def test_too_short_a_length_is_refused(suite, task):
    with pytest.raises(LengthError, match=r"needs at least \d+ tokens; 20 are too few"):
        suite.make(task, 0, 20, count)


def test_pass_key_as_published():
    example = infinite.make_passkey(random.Random(0), 0, 10)
    assert example.instruction == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there."
    )
    key = example.answers[0]
    assert re.fullmatch(r"\d{5}", key)
    lines = example.document.split("\n")
    assert lines.count(infinite.NOISE) == 10 and len(lines) == 11
    assert f"The pass key is {key}. Remember it. {key} is the pass key." in lines
    assert example.closing == "What is the pass key?"


def test_places_of_the_key_are_the_59_published_ones_each_as_often():
    size = 580
    places = []
    for number in range(118):
        lines = infinite.make_passkey(random.Random(number), number, size).document.split("\n")
        places.append(next(i for i, line in enumerate(lines) if line != infinite.NOISE))
    assert sorted(places) == sorted([10 * k for k in range(59)] * 2)


def test_numbers_hold_ten_digits_five_of_which_repeat_a_neighbour():
    for n in range(50):
        key = infinite.make_number(random.Random(n), n, 1).answers[0]
        assert re.fullmatch(r"\d{10}", key)
        assert len(re.sub(r"(.)\1+", r"\1", key)) <= 5


def test_kv_is_json_of_uuids_and_the_key_moves_through_it():
    places = set()
    for number in range(500):
        example = infinite.make_kv(random.Random(7), number, 500)
        if number < 3:
            pairs = json.loads(example.document.removeprefix("JSON data:\n"))
            key = re.search(r'Key: "([^"]+)"', example.question)[1]
            assert len(pairs) == 500 and pairs[key] == example.answers[0]
            assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key)
        places.add(example.document.index(example.answers[0]))
    assert len(places) == 500


def test_math_find_asks_in_turn_and_answers_by_rank_of_distinct_numbers():
    for number, kind in enumerate(infinite.FINDS * 3):
        example = infinite.make_find(random.Random(number), number, 101 + number % 2)
        numbers = json.loads(example.document)
        distinct = sorted(set(numbers))
        ranks = {"largest": -1, "second largest": -2, "third largest": -3, "smallest": 0, "second smallest": 1,
                 "third smallest": 2}  # fmt: skip
        name = kind.removesuffix(" number")
        ordered = sorted(numbers)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        assert float(example.answers[0]) == (middle if name == "median" else distinct[ranks[name]])
        assert f"The {kind} of the list is:" in example.closing
        assert kind in example.instruction
        assert all(0 <= n <= 99 for n in numbers)


def test_ruler_needles_as_configured():
    one = ruler.make_niah("niah_single_1", random.Random(0), 0, 20)
    assert one.instruction.startswith("A special magic number is hidden within the following text.")
    assert re.fullmatch(r"What is the special magic number for \S+ mentioned in the provided text\?", one.closing)
    assert re.fullmatch(r"\d{7}", one.answers[0])
    several = ruler.make_niah("niah_multivalue", random.Random(0), 0, 200)
    assert several.instruction.startswith("Some special magic numbers are hidden")
    assert len(set(several.answers)) == 4 and several.closing.startswith("What are all the special magic numbers for")
    asked = ruler.make_niah("niah_multiquery", random.Random(0), 0, 200)
    assert len(asked.answers) == 4 and re.search(r"for \S+, \S+, \S+, and \S+ mentioned", asked.closing)
    needles = ruler.make_niah("niah_multikey_3", random.Random(0), 0, 40)
    assert needles.document.count("One of the special magic uuids for") == 41


def test_ruler_tracks_a_chain_in_order_behind_a_worked_example():
    example = ruler.make_tracking(random.Random(0), 0, 50)
    value = re.search(r"assigned the value (\d{5})", example.closing)[1]
    found = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", example.document)
    assert [name for name, _ in found] == list(example.answers)
    assert [source for _, source in found] == [value, *example.answers[:-1]]
    assert example.instruction.count("Memorize and track") == 2 and "they are:" in example.instruction


def test_ruler_common_words_are_the_most_frequent():
    example = ruler.make_common(random.Random(0), 0, 30)
    words = re.findall(r"\d+\. (\S+)", example.document)
    counts = {word: words.count(word) for word in set(words)}
    assert {word for word, n in counts.items() if n == 30} == set(example.answers)
    assert sorted(set(counts.values())) == [3, 30]


def test_ruler_lists_common_words_less_often_in_short_prompts():
    for n_tokens, often, seldom in ((2_000, 6, 1), (6_000, 30, 3)):
        example = ruler.SUITE.make("cwe", 0, n_tokens, count)
        words = re.findall(r"\d+\. (\S+)", example.document)
        counts = {word: words.count(word) for word in set(words)}
        assert {word for word, n in counts.items() if n == often} == set(example.answers)
        assert sorted(set(counts.values())) == [seldom, often]
        shown = example.instruction.partition("Question:")[0]
        assert len(re.findall(r"\d+\. ", shown)) == (40 if often == 6 else 190)


# ------------------------------------------------------------------ files

ROWS = {
    ("infinite", "longbook_qa_eng"): {"id": 0, "context": "A book.", "input": "Who?", "answer": ["Ann", "Anne"], "options": []},
    ("infinite", "longbook_choice_eng"): {"id": 0, "context": "A book.", "input": "Who?", "answer": ["Ann"],
                                          "options": ["Bob", "Ann", "Cy", "Di"]},
    ("infinite", "longbook_sum_eng"): {"id": 0, "context": "A book.", "input": "", "answer": ["A story."], "options": []},
    ("infinite", "longbook_qa_chn"): {"id": 0, "context": "书。", "input": "谁？", "answer": ["安"], "options": []},
    ("infinite", "longdialogue_qa_eng"): {"id": 0, "context": "ANN: hello", "input": "", "answer": ["ANN"], "options": []},
    ("infinite", "code_debug"): {"id": 0, "context": "def f(): pass", "input": "", "answer": "m.f",
                                 "options": ["m.f", "m.g", "m.h", "m.i"]},
    ("infinite", "code_run"): {"id": 0, "context": "def func_1(x): ...", "answer": 4,
                               "input": "Please give me the exact number of the return value of func_1(-2). Your ..."},
    ("infinite", "math_calc"): {"id": 0, "context": "1 + 3 - 2", "input": "", "answer": [4, 2], "options": []},
    ("infinite", "math_find"): {"id": 0, "context": "[1, 2]", "answer": 2, "options": [],
                                "input": "You should answer with only one number, ... The largest number of the list is: "},
    ("infinite", "passkey"): {"id": 0, "context": "The pass key is 12345.", "input": "What is the key?", "answer": ["12345"]},
    ("infinite", "kv_retrieval"): {"id": 0, "context": 'JSON data:\n{"a": "b"}', "input": '\nKey: "a"\n...: ', "answer": ["b"]},
    ("longbench", "hotpotqa"): {"input": "Who?", "context": "Passage 1: Ann.", "answers": ["Ann"], "all_classes": None},
    ("longbench", "gov_report"): {"input": "", "context": "A report.", "answers": ["Short."], "all_classes": None},
    ("longbench", "lcc"): {"input": "", "context": "x = 1\n", "answers": ["y = 2"], "all_classes": None},
    ("longbench", "trec"): {"input": "Question: Who?\nType:", "context": "Question: ...", "answers": ["Person"],
                            "all_classes": ["Person", "Food"]},
    ("longbench", "repobench-p"): {"input": "y = 2\n", "context": "x = 1\n", "answers": ["z = 3"], "all_classes": None},
    ("babilong", "qa1"): {"input": "Mary went to the office.", "question": "Where is Mary? ", "target": "office"},
    ("ruler", "qa_1"): {"index": 0, "input": "Answer ...\n\nDocument 1: Ann.\n\nQuestion: Who?", "outputs": ["Ann"]},
    ("ruler", "niah_single_2"): {"index": 0, "input": "A special ...\nText.\nWhat is the special magic number for x?",
                                 "outputs": ["1234567"]},
}  # fmt: skip


def write(folder, suite, task, rows):
    path = folder / suite.file(task, "1k")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "task"), ROWS, ids=lambda x: x)
def test_files_of_the_published_form(tmp_path, name, task):
    suite = next(s for s in SUITES if s.name == name)
    row = ROWS[name, task]
    write(tmp_path, suite, task, [row, row])
    first, second = suite.read(task, "1k", tmp_path)
    assert first == second
    text = row.get("context") or row["input"]
    assert first.document in text and first.document
    assert (first.question and first.question in first.closing) or task in ("code_run", "code_debug")
    assert "{" not in first.instruction + first.closing.replace('{"', "")
    output = f"The answer is: {first.answers[-1]}" if task == "code_debug" else first.answers[-1]
    assert suite.tasks[task].metric(output, first) > 0 or task == "math_calc"


def test_values_of_math_calc_may_be_a_list_in_a_list(tmp_path):
    row = ROWS["infinite", "math_calc"]
    write(tmp_path, infinite.SUITE, "math_calc", [row, row | {"answer": [row["answer"]]}])
    plain, nested = infinite.SUITE.read("math_calc", "", tmp_path)
    assert plain.answers == nested.answers == ("4", "2")


@pytest.mark.parametrize("task", ["math_calc", "longbook_sum_eng", "longdialogue_qa_eng", "code_debug"])
def test_an_input_that_no_prompt_uses_may_be_missing(tmp_path, task):
    row = {name: value for name, value in ROWS["infinite", task].items() if name != "input"}
    write(tmp_path, infinite.SUITE, task, [row, row | {"input": None}])
    first, second = infinite.SUITE.read(task, "", tmp_path)
    assert first == second


def test_a_choice_is_right_by_letter_or_text(tmp_path):
    write(tmp_path, infinite.SUITE, "longbook_choice_eng", [ROWS["infinite", "longbook_choice_eng"]])
    (example,) = infinite.SUITE.read("longbook_choice_eng", "", tmp_path)
    assert example.answers == ("Ann", "B") and "B. Ann" in example.closing


def test_the_beginning_of_the_answer_in_ruler_files_ends_the_question(tmp_path):
    row = ROWS["ruler", "niah_single_2"]
    begun = " The special magic number for x mentioned in the provided text is"
    write(tmp_path, ruler.SUITE, "niah_single_2", [row, row | {"answer_prefix": begun}])
    old, new = ruler.SUITE.read("niah_single_2", "1k", tmp_path)
    assert old.closing == "What is the special magic number for x?"
    assert new.closing == old.closing + begun
    assert new.question == old.question


def test_babilong_prompts_are_of_the_named_commit(tmp_path):
    write(tmp_path, babilong.SUITE, "qa3", [ROWS["babilong", "qa1"] | {"input": " Mary went.\n"}])
    (example,) = babilong.SUITE.read("qa3", "1k", tmp_path)
    assert example.document == "Mary went."
    assert example.closing == "</context>\n\nQuestion: Where is Mary?"
    parts = example.instruction.split("\n\n")
    assert len(parts) == 4 and parts[3] == "<context>"
    assert parts[0].endswith("remains in the first location.")
    assert parts[1].endswith("Answer: Before the bedroom the football was in the garden.\n</example>")
    assert parts[2].startswith(
        "Always return your answer in the following format: Before the $location_1$ the $item$ was in"
    )


def test_only_tasks_that_ask_something_have_it_ahead_of_the_text():
    silent = {("longbench", name) for name in ("gov_report", "multi_news", "passage_count", "lcc")}
    silent |= {("infinite", "longdialogue_qa_eng"), ("infinite", "math_calc")}
    for (name, task), row in ROWS.items():
        suite = next(s for s in SUITES if s.name == name)
        example = suite.parse(suite.tasks[task], Row(row, "here"))
        assert example.leads is ((name, task) not in silent), task


def test_a_file_may_be_one_json_list(tmp_path):
    path = write(tmp_path, babilong.SUITE, "qa1", [])
    path.write_text(json.dumps([ROWS["babilong", "qa1"]] * 3))
    assert len(babilong.SUITE.read("qa1", "1k", tmp_path)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no passkey\.jsonl, the file of ∞-Bench passkey"),
        ("", "passkey.jsonl is empty"),
        ('{"context": "a"', r"passkey\.jsonl, line 1: not JSON"),
        ("[1, 2]", "entry 1: not a JSON object"),
        ("3\n", "line 1: not a JSON object"),
        ('{"context": "a", "input": "b"}', r"line 1: field 'answer' is missing \(fields: 'context', 'input'\)"),
        (
            '{"context": 1, "input": "b", "answer": "c"}',
            "line 1: field 'context' holds a number where text is expected",
        ),
        ('{"context": "a", "input": "b", "answer": []}', "field 'answer' is an empty list"),
        ('{"context": "a", "input": "b", "answer": [{}]}', "field 'answer' holds an object"),
        (
            '{"context": "a", "input": "b", "answer": "1"}\n\n{"context": "a", "answer": "1"}',
            "line 3: field 'input' is missing",
        ),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_wrong_files_are_named_with_line_and_field(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "passkey.jsonl").write_bytes(content)
    elif content is not None:
        (tmp_path / "passkey.jsonl").write_text(content)
    with pytest.raises(DatasetError, match=message):
        infinite.SUITE.read("passkey", "", tmp_path)


def test_options_must_hold_the_answer(tmp_path):
    write(
        tmp_path, infinite.SUITE, "longbook_choice_eng", [ROWS["infinite", "longbook_choice_eng"] | {"answer": ["Zoe"]}]
    )
    with pytest.raises(DatasetError, match="field 'options' must hold four options, the answer among them"):
        infinite.SUITE.read("longbook_choice_eng", "", tmp_path)


def test_the_hub_is_asked_through_datasets(monkeypatch):
    import sys
    import types

    asked = []

    def load_dataset(kind, data_files, split):
        asked.append((kind, data_files, split))
        if "qasper" in data_files:
            raise ConnectionError("no network")
        return [ROWS["longbench", "hotpotqa"]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (example,) = longbench.SUITE.read("hotpotqa", "", None)
    assert example.answers == ("Ann",)
    assert asked == [("json", "zip://data/hotpotqa.jsonl::hf://datasets/THUDM/LongBench/data.zip", "train")]
    with pytest.raises(DatasetError, match="ConnectionError: no network Give a folder"):
        longbench.SUITE.read("qasper", "", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="`datasets`, which is not installed"):
        longbench.SUITE.read("hotpotqa", "", None)


def test_every_task_has_a_prompt_with_its_text():
    for suite in SUITES:
        for task in suite.tasks.values():
            assert "{context}" in task.template
