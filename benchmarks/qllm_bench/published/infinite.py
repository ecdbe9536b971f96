"""∞-Bench (Zhang et al. 2024, arXiv 2402.13718): its tasks, metrics and synthetic contexts.

The prompts are those of appendix C for GPT-4. The synthetic tasks follow section 3.2 and the code that made the data:

* Retrieve.PassKey: five digits in one of 59 places evenly spread over lines of one noise text.
* Retrieve.Number: ten digits, five drawn and five that repeat a neighbour, likewise.
* Retrieve.KV: a JSON object of random UUIDs; the key asked for moves through it in 500 even steps.
* Math.Find: a list of numbers from 0 to 99 whose upper end (for the largest) or lower end (for the smallest) is drawn anew;
  equal numbers count once; the median of an even number of entries is the mean of the middle two.
"""

from __future__ import annotations

import random
import uuid

from qllm_bench.published import metrics
from qllm_bench.published.example import DatasetError, Example, Metric, Row, Task
from qllm_bench.published.prompts import prompts
from qllm_bench.published.suite import Rule, Suite

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
#: Places of the key in section 3.2.1, and keys asked for in Retrieve.KV.
PLACES, KV_STEPS = 59, 500
FINDS = (
    "largest number", "second largest number", "third largest number", "smallest number", "second smallest number",
    "third smallest number", "median number",
)  # fmt: skip

# name: (title, metric, published limit of tokens)
_TASKS: dict[str, tuple[str, Metric, int]] = {
    "passkey": ("Retrieve.PassKey", metrics.first_integer, 6),
    "number_string": ("Retrieve.Number", metrics.first_integer, 12),
    "kv_retrieval": ("Retrieve.KV", metrics.contains_value, 50),
    "math_find": ("Math.Find", metrics.first_number, 3),
    "math_calc": ("Math.Calc", metrics.leading_values, 30_000),
    "code_run": ("Code.Run", metrics.last_word, 5),
    "code_debug": ("Code.Debug", metrics.named_function, 5),
    "longbook_qa_eng": ("En.QA", metrics.word_f1, 40),
    "longbook_choice_eng": ("En.MC", metrics.chosen_option, 40),
    "longbook_sum_eng": ("En.Sum", metrics.rouge_l_sum, 1200),
    "longbook_qa_chn": ("Zh.QA", metrics.character_f1, 40),
    "longdialogue_qa_eng": ("En.Dia", metrics.named_speaker, 40),
}
TASKS = {
    name: Task(name, title, prompts("infinite")[name], metric, limit) for name, (title, metric, limit) in _TASKS.items()
}
#: The published limits are counted in GPT-4's tokens. These leave room for a tokenizer that takes a token per digit and for a
#: full sentence. Only the first number counts, so that more room gains nothing else; but Retrieve.KV's value counts anywhere.
_ROOM = {"passkey": 32, "number_string": 48, "kv_retrieval": 96, "math_find": 32}

#: Tasks whose prompts have no place for the field `input`.
_WITHOUT_INPUT = ("longbook_sum_eng", "longdialogue_qa_eng", "math_calc", "code_debug")
#: What the metrics of these tasks read the answers as.
_NUMBERS: dict[str, type[int] | type[float]] = {
    "passkey": int, "number_string": int, "math_find": float, "math_calc": int, "code_run": int,
}  # fmt: skip


def _question(kind: str) -> str:
    return f"You should answer with only one number, no other words. The {kind} of the list is:"


def _hide(statement: str, question: str, task: str, number: int, size: int, key: str) -> Example:
    # 59 is prime, so every run of 59 questions visits each place once; consecutive ones lie about 0.6 of the text apart.
    before = round(size * (number * 36 % PLACES) / (PLACES - 1))
    line = statement.format(key=key)
    document = "\n".join([*[NOISE] * before, line, *[NOISE] * (size - before)])
    return TASKS[task].example(document, question, [key], fields={"input": question}, max_tokens=_ROOM[task])


def make_passkey(rng: random.Random, number: int, size: int) -> Example:
    """Retrieve.PassKey among `size` lines of noise."""
    key = "".join(str(rng.randrange(10)) for _ in range(5))
    statement = "The pass key is {key}. Remember it. {key} is the pass key."
    return _hide(statement, "What is the pass key?", "passkey", number, size, key)


def make_number(rng: random.Random, number: int, size: int) -> Example:
    """Retrieve.Number among `size` lines of noise."""
    digits = [str(rng.randrange(10)) for _ in range(5)]
    for _ in range(5):
        at = rng.randrange(len(digits))
        digits.insert(at, digits[at])
    statement = "The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
    return _hide(statement, "What is the sequence of digits?", "number_string", number, size, "".join(digits))


def make_kv(rng: random.Random, number: int, size: int) -> Example:
    """Retrieve.KV over `size` pairs."""

    def draw() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    pairs = [(draw(), draw()) for _ in range(size)]
    # 309 has no common factor with 500, so every run of 500 questions visits each step once.
    key, value = pairs[size * (number * 309 % KV_STEPS) // KV_STEPS]
    document = "JSON data:\n{" + ", ".join(f'"{k}": "{v}"' for k, v in pairs) + "}"
    question = f'Key: "{key}"\nThe value associated with the specified key is:'
    fields = {"input": question}
    return TASKS["kv_retrieval"].example(document, question, [value], fields=fields, max_tokens=_ROOM["kv_retrieval"])


def make_find(rng: random.Random, number: int, size: int) -> Example:
    """Math.Find in a list of `size` numbers; the seven questions take turns."""
    kind = FINDS[number % len(FINDS)]
    low, high = 0, 99
    if "largest" in kind or ("median" in kind and rng.random() < 0.5):
        high = rng.randint(int(high * 0.8), high)
    else:
        low = rng.randint(low, int(high * 0.2))
    numbers = [rng.randint(low, high) for _ in range(size)]
    if "median" in kind:
        middle = sorted(numbers)
        a, b = middle[(size - 1) // 2], middle[size // 2]
        answer = str(a if size % 2 else (a + b) / 2)
        prompt = "Calculate the median number from the list below:"
    else:
        rank = ("second" in kind) + 2 * ("third" in kind)
        distinct = sorted(set(numbers), reverse="largest" in kind)
        answer = str(distinct[rank])
        prompt = f"Find the {kind} from the list below:"
    question = _question(kind)
    fields = {"prompt": prompt, "input": question}
    return TASKS["math_find"].example(str(numbers), question, [answer], fields=fields, max_tokens=_ROOM["math_find"])


def parse(task: Task, row: Row) -> Example:
    """A row with the published fields `context`, `answer`, `input` where it is used and, for choices, `options`.

    Raises:
        DatasetError: A field is missing or of another form.
    """
    document = row.document("context")
    question = "" if task.name in _WITHOUT_INPUT else row.text("input")
    if task.name == "math_calc":
        row = row.flat("answer")  # one list of lists in the published file
    number = _NUMBERS.get(task.name)
    answers = row.texts("answer") if number is None else row.numbers("answer", number)
    fields, max_tokens = {"input": question.strip()}, _ROOM.get(task.name)
    if task.name == "math_find":
        kind = next((kind for kind in sorted(FINDS, key=len, reverse=True) if kind in question), None)
        if kind is None:
            raise DatasetError(f"{row.where}: field 'input' asks for none of: {', '.join(FINDS)}.")
        verb = "Calculate" if "median" in kind else "Find"
        fields["prompt"] = f"{verb} the {kind} from the list below:"
    elif task.name == "code_run":
        call = next((word for word in question.replace("`", " ").split() if word.startswith("func_")), None)
        if call is None:
            raise DatasetError(f"{row.where}: field 'input' names no call like func_1(2).")
        call = call.rstrip(".,")
        fields = {"call": call, "function": call.partition("(")[0]}
        question = f"the return value of {call}"
    elif task.name in ("longbook_choice_eng", "code_debug"):
        options = row.texts("options")
        if len(options) != 4 or answers[0] not in options:
            raise DatasetError(f"{row.where}: field 'options' must hold four options, the answer among them.")
        fields |= dict(zip("abcd", options, strict=True))
        answers = (answers[0], "ABCD"[options.index(answers[0])])
        question = question if task.name == "longbook_choice_eng" else " ".join(options)
    return task.example(document, question, answers, fields=fields, max_tokens=max_tokens)


SUITE = Suite(
    name="infinite",
    title="∞-Bench",
    tasks=TASKS,
    rules={
        "passkey": Rule(make_passkey, least=0),
        "number_string": Rule(make_number, least=0),
        "kv_retrieval": Rule(make_kv),
        "math_find": Rule(make_find, least=64),
    },
    parse=parse,
    file=lambda task, _: f"{task}.jsonl",
    hub=lambda task, _: f"hf://datasets/xinrongzhang2022/InfiniteBench/{task}.jsonl",
)
