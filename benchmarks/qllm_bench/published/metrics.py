"""Metrics as the code of the papers computes them.

∞-Bench (arXiv 2402.13718), LongBench (2308.14508), BABILong (2406.10149), RULER (2404.06654).

∞-Bench's rules for multiple choice, dialogues and Code.Debug are those of its repository since August 2024, which accept more
than the rules behind the paper's numbers.

All take the output and its example and return a share between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import takewhile

from qllm_bench.published.example import Example, Metric

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_LETTERS = "ABCD"


# ------------------------------------------------------------------ F1 over words (SQuAD), all four suites


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and double spaces."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _f1(got: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(got) & Counter(wanted)).values())
    return 2 * same / (len(got) + len(wanted)) if same else 0.0


def word_f1(output: str, example: Example) -> float:
    """F1 of words against the best accepted answer."""
    got = normalised(output).split()
    return max(_f1(got, normalised(answer).split()) for answer in example.answers)


def character_f1(output: str, example: Example) -> float:
    """F1 of characters against the best accepted answer (∞-Bench Zh.QA)."""
    drop = set(string.punctuation + _CHINESE_PUNCTUATION)

    def characters(text: str) -> list[str]:
        return [c for c in text.lower() if c not in drop and not c.isspace()]

    return max(_f1(characters(output), characters(answer)) for answer in example.answers)


# ------------------------------------------------------------------ ROUGE-L


def _common(reference: Sequence[str], candidate: Sequence[str], keep_reference: bool) -> list[int]:
    """Indices in `reference` of one longest common subsequence.

    Where several are equally long, the two implementations behind published numbers step back differently: along the
    candidate first (`keep_reference`) or along the reference.
    """
    n, m = len(reference), len(candidate)
    table = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n):
        row, last = table[i + 1], table[i]
        for j in range(m):
            row[j + 1] = last[j] + 1 if reference[i] == candidate[j] else max(last[j + 1], row[j])
    found: list[int] = []
    i, j = n, m
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            found.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1] or (table[i - 1][j] == table[i][j - 1] and not keep_reference):
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _harmonic(recall: float, precision: float) -> float:
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def rouge_l(output: str, example: Example) -> float:
    """ROUGE-L as LongBench takes it: over sets of words, sentences cut at full stops, the best accepted answer."""

    def sentences(text: str) -> list[list[str]]:
        return [" ".join(s.split()).split(" ") for s in text.split(".") if s]

    def score(reference: str) -> float:
        wanted, got = sentences(reference), sentences(output)
        if not wanted or not got:
            return 0.0
        union = {w[i] for w in wanted for g in got for i in _common(w, g, keep_reference=True)}
        recall = len(union) / len({word for s in wanted for word in s})
        precision = len(union) / len({word for s in got for word in s})
        return _harmonic(recall, precision)

    return max(map(score, example.answers))


def rouge_l_sum(output: str, example: Example) -> float:
    """ROUGE-Lsum (Lin 2004) without stemming, sentences being lines; as ∞-Bench takes it for En.Sum."""

    def sentences(text: str) -> list[list[str]]:
        return [words for line in text.split("\n") if (words := re.findall(r"[a-z0-9]+", line.lower()))]

    def score(reference: str) -> float:
        wanted, got = sentences(reference), sentences(output)
        left, spent = Counter(w for s in got for w in s), Counter(w for s in wanted for w in s)
        total_got, total_wanted = sum(left.values()), sum(spent.values())
        if not total_got or not total_wanted:
            return 0.0
        hits = 0
        for sentence in wanted:
            for i in sorted({i for g in got for i in _common(sentence, g, keep_reference=False)}):
                word = sentence[i]
                if left[word] > 0 and spent[word] > 0:
                    hits += 1
                    left[word] -= 1
                    spent[word] -= 1
        return _harmonic(hits / total_wanted, hits / total_got)

    return max(map(score, example.answers))


# ------------------------------------------------------------------ ∞-Bench


def _words(text: str, drop: str) -> list[str]:
    return text.translate(dict.fromkeys(map(ord, drop), " ")).split()


def first_integer(output: str, example: Example) -> float:
    """Whether the first run of digits is the answer (Retrieve.PassKey, Retrieve.Number)."""
    found = re.search(r"[0-9]+", output)
    return float(found is not None and found[0] == example.answers[0])


def contains_value(output: str, example: Example) -> float:
    """Whether the answer stands as a word in the output, JSON punctuation taken as spaces (Retrieve.KV)."""
    return float(example.answers[0] in _words(output, "\n:\"'.,?!{}"))


def first_number(output: str, example: Example) -> float:
    """Whether the first number, whole or with decimals, is the answer (Math.Find)."""
    found = re.search(r"\d+\.\d+|\d+", output)
    return float(found is not None and float(found[0]) == float(example.answers[0]))


def leading_values(output: str, example: Example) -> float:
    """Share of the intermediate values that are right ahead of the first error (Math.Calc).

    The prompt's examples begin with the expression's first number, the labels do not: answers may do either.
    """
    values = [number.lstrip("0") for number in re.findall(r"[0-9]+", output)]  # int() refuses more than 4,300 digits
    first = re.search(r"[0-9]+", example.document)
    lists = [values]
    if first and values[:1] == [first[0].lstrip("0")]:
        lists.append(values[1:])
    wanted = [answer.strip().lstrip("0") for answer in example.answers]
    return max(_agreeing(found, wanted) for found in lists) / len(wanted)


def _agreeing(found: Sequence[str], wanted: Sequence[str]) -> int:
    pairs = zip(found, wanted, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def last_word(output: str, example: Example) -> float:
    """Whether the last word is the returned number (Code.Run)."""
    words = _words(output, "\n.`'\":")
    try:
        return float(bool(words) and int(words[-1]) == int(example.answers[0]))
    except ValueError:
        return 0.0


def _alone(text: str, letters: str) -> str:
    """The last of the letters that stands alone, of the first line that has any; "" where there is none."""
    found = (re.findall(rf"\b[{letters}]\b", line) for line in text.split("\n"))
    return next((line[-1] for line in found if line), "")


def _begins(text: str, marks: Sequence[str], answers: tuple[str, ...]) -> bool | None:
    """Whether one of the answers stands after the first mark that the text has; None where it has none of them."""
    mark = next((mark for mark in marks if mark in text), None)
    return None if mark is None else text.partition(mark)[2][1:].startswith(answers)


def named_function(output: str, example: Example) -> float:
    """Whether the option of the broken function is given, by letter or name (Code.Debug); answers are (name, letter)."""
    text = output.strip()
    if _alone(text, "ABCDEFGHIJ") == example.answers[1]:
        return 1.0
    text = re.sub(" +", " ", re.sub(r"[\n`'\"\-*]|[Oo]ption", " ", text))
    return float(
        text.startswith(example.answers) or _begins(text, ("answer is:", "is:", "answer:"), example.answers) or 0
    )


def chosen_option(output: str, example: Example) -> float:
    """Whether the right option is chosen (En.MC); answers are (text, letter)."""
    text, answers = output.strip(), example.answers
    if _alone(text, _LETTERS) in answers:
        return 1.0
    if text[:1] and text[0] in _LETTERS:
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = re.sub(" +", " ", re.sub("[\n\"'.,?!{}]", " ", text))
    said = _begins(text, ("answer is:", "answer:", "answer is", "option is"), answers)
    if said is not None:
        return float(said)
    return float(next((word for word in text.split() if word in _LETTERS), "") in answers)


def named_speaker(output: str, example: Example) -> float:
    """Whether one of the masked character's names is in the output, case ignored (En.Dia)."""
    return float(any(answer.upper() in output.upper() for answer in example.answers))


# ------------------------------------------------------------------ LongBench


def label_share(output: str, example: Example) -> float:
    """1 over the number of labels named when the right one is among them (TREC)."""

    def score(answer: str) -> float:
        named = [label for label in example.labels if label in output]
        named = [label for label in named if label == answer or label not in answer]
        return 1 / len(named) if answer in named else 0.0

    return max(map(score, example.answers))


def number_share(output: str, example: Example) -> float:
    """Share of the output's numbers that are the answer's (PassageCount, PassageRetrieval)."""
    numbers = re.findall(r"\d+", output)
    wanted = [re.findall(r"\d+", answer)[0] for answer in example.answers if re.search(r"\d", answer)]
    return max((numbers.count(answer) / len(numbers) for answer in wanted), default=0.0) if numbers else 0.0


def code_similarity(output: str, example: Example) -> float:
    """Similarity of the first line that is code (LCC, RepoBench-P)."""
    lines = output.lstrip("\n").split("\n")
    line = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    return max(round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 for answer in example.answers)


def of_first_line(metric: Metric, output: str, example: Example) -> float:
    """The metric of the output's first line; what LongBench's few-shot tasks are scored by."""
    return metric(output.lstrip("\n").split("\n")[0], example)


# ------------------------------------------------------------------ BABILong, RULER


def only_label(output: str, example: Example) -> float:
    """Whether the first sentence names the answer and, the question's own words apart, no other label (BABILong)."""
    text, question = output.lower().split(".")[0], example.question.lower()
    for mark in ("<context>", "<example>"):
        text = text.split(mark)[0]
    labels = {label.lower() for label in example.labels}
    named = {label for label in labels if label in text and label not in question}
    return float(named == {example.answers[0].lower()})


def all_contained(output: str, example: Example) -> float:
    """Share of the answers that the output contains, case ignored (RULER, all tasks but QA)."""
    text = output.lower()
    return sum(answer.lower() in text for answer in example.answers) / len(example.answers)


def any_contained(output: str, example: Example) -> float:
    """Whether the output contains one of the answers, case ignored (RULER QA)."""
    text = output.lower()
    return float(any(answer.lower() in text for answer in example.answers))
