"""RULER (Hsieh et al. 2024, arXiv 2404.06654): prompts, rules and metrics of its repository (`synthetic.yaml`, `constants.py`).

Where the rules here differ from the published ones: adjectives and nouns come from this package's word lists instead of
`wonderwords`, and tasks over essays use generated stories instead of Paul Graham's essays; the worked example of `vt` has five
lines of noise, where RULER's fills 500 tokens. The beginning of the answer that RULER puts into the assistant's mouth is left
out of what is made here; of RULER's files that give it (`answer_prefix`) it ends the question, as the chat template ends the
prompt. `qa` and `fwe` are read from RULER's own files only.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

from qllm_bench.published import metrics
from qllm_bench.published.example import DatasetError, Example, Row, Task
from qllm_bench.published.infinite import NOISE
from qllm_bench.published.prompts import prompts
from qllm_bench.published.suite import Rule, Suite
from qllm_bench.questions.data import Prose
from qllm_bench.questions.pools import Pools
from qllm_runtime.samples import story

#: Places of needles in essays, in shares of their sentences.
DEPTHS = tuple(round(100 * i / 39) / 100 for i in range(40))
_NIAH, _TRACK, _COMMON = (prompts("ruler")[name] for name in ("niah", "vt", "cwe"))
_READ = "{context}\n{input}"  # of files, whose input holds the prompt
_COMMON_QUESTION = "Question: What are the 10 most common words in the above list?"


@dataclass(frozen=True)
class Needles:
    """A `niah` task of `synthetic.yaml`: what it hides, in what, and how much of it."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1


@dataclass(frozen=True)
class Counts:
    """How often the words of `cwe` are listed.

    Attributes:
        others: Uncommon words of the worked example.
        worked: Times of a common and of another word there.
        asked: The same of the list that is asked about.
    """

    others: int
    worked: tuple[int, int]
    asked: tuple[int, int]


#: RULER's for prompts from 4,096 tokens, and for shorter ones.
COUNTS, BRIEF = Counts(30, (10, 3), (30, 3)), Counts(10, (3, 1), (6, 1))

NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", n_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", n_values=4),
    "niah_multiquery": Needles("essay", n_keys=4, n_queries=4),
}
_TITLES = {
    "vt": "variable tracking",
    "cwe": "common words",
    "fwe": "frequent words",
    "qa_1": "QA (SQuAD)",
    "qa_2": "QA (HotpotQA)",
}
TASKS = {
    **{name: Task(name, name.replace("_", " "), _NIAH, metrics.all_contained, 128) for name in NIAH},
    "vt": Task("vt", "variable tracking", _TRACK, metrics.all_contained, 30),
    "cwe": Task("cwe", "common words", _COMMON, metrics.all_contained, 120),
    "fwe": Task("fwe", "frequent words", _READ, metrics.all_contained, 50),
    "qa_1": Task("qa_1", "QA (SQuAD)", _READ, metrics.any_contained, 32),
    "qa_2": Task("qa_2", "QA (HotpotQA)", _READ, metrics.any_contained, 32),
}


def _draw(pools: Pools, kind: str) -> str:
    rng = pools.rng
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(pools.adjectives)}-{rng.choice(pools.nouns)}"


def _distinct(pools: Pools, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw(pools, kind)] = None
    return list(found)


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


@cache
def _essay() -> Prose:
    return Prose.of(" ".join(" ".join(story(random.Random("ruler"), 400_000)).split()))


def _in_essay(rng: random.Random, needles: list[str], size: int) -> str:
    """`size` sentences with the needles at different depths, the text repeated where it is too short."""
    prose = _essay()
    sentences = [prose.text[a:b].strip() for a, b in pairwise(prose.cuts)]
    sentences = (sentences * (size // len(sentences) + 1))[:size]
    parts, last = [], 0
    for depth, needle in zip(sorted(rng.sample(DEPTHS, len(needles))), needles, strict=True):
        at = int(size * depth)
        parts += [*sentences[last:at], needle]
        last = at
    return " ".join([*parts, *sentences[last:]])


def make_niah(task: str, rng: random.Random, number: int, size: int) -> Example:
    """A needle task over `size` sentences of an essay, lines of noise, or other needles."""
    needles, pools = NIAH[task], Pools(rng, evaluation=True)
    keys = _distinct(pools, needles.keys, needles.n_keys)
    values = {key: _distinct(pools, needles.values, needles.n_values) for key in keys}
    hidden = [_needle(needles.values, key, value) for key in keys for value in values[key]]
    rng.shuffle(hidden)
    if needles.haystack == "essay":
        document = _in_essay(rng, hidden, size)
    else:
        lines = [NOISE] * size
        if needles.haystack == "needle":
            lines = [
                _needle(needles.values, _draw(pools, needles.keys), _draw(pools, needles.values)) for _ in range(size)
            ]
        for at, needle in zip(sorted(rng.sample(range(size + 1), len(hidden)), reverse=True), hidden, strict=True):
            lines.insert(at, needle)
        document = "\n".join(lines)
    asked = rng.sample(keys, needles.n_queries)
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    one = needles.n_values * needles.n_queries == 1
    kind = needles.values.removesuffix("s") if one else needles.values
    are, some, what = ("is", "A", "is") if one else ("are", "Some", "are all")
    question = f"What {what} the special magic {kind} for {query} mentioned in the provided text?"
    fields = {"some": some, "are": are, "kind": kind, "input": question}
    return TASKS[task].example(document, question, [v for key in asked for v in values[key]], fields=fields)


def _chain(rng: random.Random, size: int, value: str, letters: int) -> tuple[str, list[str]]:
    """`size` lines of noise with a chain of five variables of one value; returns the text and the variables."""
    names: dict[str, None] = {}
    while len(names) < 5:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    variables = list(names)
    statements = [f"VAR {variables[0]} = {value}"]
    statements += [f"VAR {b} = VAR {a} " for a, b in pairwise(variables)]
    lines = [NOISE] * size
    for n, at in enumerate(sorted(rng.sample(range(size + 1), 5))):
        lines.insert(at + n, statements[n])
    return "\n".join(lines), variables


def _track_question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def make_tracking(rng: random.Random, number: int, size: int) -> Example:
    """Variable tracking, one chain of four hops over `size` lines of noise, after one worked example of five lines."""
    shown = str(rng.randint(10_000, 99_999))
    text, variables = _chain(rng, 5, shown, 3)
    worked = _TRACK.format(context=text, input=_track_question(shown))
    worked += (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
        f"{shown}, they are:  {' '.join(variables)}\n"
    )
    value = str(rng.randint(10_000, 99_999))
    document, variables = _chain(rng, size, value, 5)
    question = _track_question(value)
    example = TASKS["vt"].example(document, question, variables, fields={"input": question})
    return _behind(worked, example)


def make_common(rng: random.Random, number: int, size: int, counts: Counts = COUNTS) -> Example:
    """Common words: ten words among `size` others, after one worked example."""
    pools = Pools(rng, evaluation=True)
    # English words first, as published; invented ones where the lists end.
    words = list(dict.fromkeys((*pools.nouns, *pools.adjectives)))
    rng.shuffle(words)
    known = set(words)
    while len(words) < size + 50:
        word = pools.invented().lower()
        if word not in known:
            known.add(word)
            words.append(word)

    def numbered(common: list[str], other: list[str], times: tuple[int, int]) -> str:
        listed = common * times[0] + other * times[1]
        rng.shuffle(listed)
        return " ".join(f"{n}. {word}" for n, word in enumerate(listed, start=1))

    shown = numbered(words[:10], words[10 : 10 + counts.others], counts.worked)
    worked = _COMMON.format(context=shown, input=_COMMON_QUESTION)
    answer = " ".join(f"{n}. {word}" for n, word in enumerate(words[:10], start=1))
    worked += f" Answer: The top 10 words that appear most often in the list are: {answer}\n"
    common, other = words[40:50], words[50 : 50 + size]
    document = numbered(common, other, counts.asked)
    example = TASKS["cwe"].example(document, _COMMON_QUESTION, common, fields={"input": _COMMON_QUESTION})
    return _behind(worked, example)


def _behind(worked: str, example: Example) -> Example:
    return replace(example, instruction=f"{worked}{example.instruction}")


def parse(task: Task, row: Row) -> Example:
    """A row of RULER's own files: the question is the last line of `input`, after it comes `answer_prefix` if there is one.

    Raises:
        DatasetError: A field is missing or of another form.
    """
    document, _, question = row.text("input").strip().rpartition("\n")
    if not document:
        raise DatasetError(
            f"{row.where}: field 'input' holds a single line; the question is expected on a line of its own."
        )
    begun = row.text("answer_prefix").strip() if "answer_prefix" in row.values else ""
    fields = {"input": f"{question} {begun}", "some": "", "kind": "", "are": ""}
    example = task.example(document, question, row.texts("outputs"), fields=fields)
    return replace(example, instruction="")  # it stands in the input


RULES: dict[str, Callable[[random.Random, int, int], Example]] = {
    **{name: partial(make_niah, name) for name in NIAH},
    "vt": make_tracking,
    "cwe": make_common,
}

BRIEF_RULES = {"cwe": partial(make_common, counts=BRIEF)}

SUITE = Suite(
    name="ruler",
    title="RULER",
    tasks=TASKS,
    rules={name: Rule(make, least=8, brief=BRIEF_RULES.get(name)) for name, make in RULES.items()},
    parse=parse,
    file=lambda task, length: f"{task}/validation.jsonl",
    hub=None,
)
