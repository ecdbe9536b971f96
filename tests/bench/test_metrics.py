"""Metrics of published benchmarks against hand-worked values."""

from functools import partial

import pytest

from qllm_bench.published import metrics
from qllm_bench.published.example import Example


def score(metric, output, *answers, labels=(), question=""):
    return metric(output, Example("task", "", "text", question, question, answers, 8, labels))


@pytest.mark.parametrize(
    ("metric", "output", "answers", "expected"),
    [
        (metrics.first_integer, "The pass key is 71432. Remember it.", ("71432",), 1),
        (metrics.first_integer, "In 1 of 2 places: 71432", ("71432",), 0),
        (metrics.first_integer, "no digits", ("71432",), 0),
        (metrics.first_integer, "714329", ("71432",), 0),
        (metrics.contains_value, 'The value is "ab-12".', ("ab-12",), 1),
        (metrics.contains_value, "The value is ab-123.", ("ab-12",), 0),
        (metrics.first_number, "It is 49.5, I think.", ("49.5",), 1),
        (metrics.first_number, "It is 49, not 49.5.", ("49.5",), 0),
        (metrics.first_number, "98", ("98",), 1),
        (metrics.first_number, "none", ("98",), 0),
        (metrics.leading_values, "[1, 4, 9]", ("1", "4", "8", "2"), 0.5),
        (metrics.last_word, "The return value is: -7.", ("-7",), 1),
        (metrics.last_word, "It returns seven", ("7",), 0),
        (metrics.last_word, "", ("7",), 0),
        (metrics.named_function, "B. that one", ("Tree.grow", "B"), 1),
        (metrics.named_function, "I think the answer is: Tree.grow", ("Tree.grow", "B"), 1),
        (metrics.named_function, "The answer is: C", ("Tree.grow", "B"), 0),
        (metrics.named_function, "Tree.grow is broken", ("Tree.grow", "B"), 1),
        (metrics.named_function, "A and C are right, so it must be B", ("Tree.grow", "B"), 1),
        (metrics.named_function, "Not B but C", ("Tree.grow", "B"), 0),
        (metrics.named_function, "I choose D\nor B", ("Tree.grow", "B"), 0),
        (metrics.named_function, "The answer is:", ("Tree.grow", "B"), 0),
        (metrics.named_function, "", ("Tree.grow", "B"), 0),
        (metrics.chosen_option, "C", ("a dog", "C"), 1),
        (metrics.chosen_option, "A dog barks: C", ("a dog", "C"), 1),
        (metrics.chosen_option, "Dogs. The answer is: a dog", ("a dog", "C"), 0),
        (metrics.chosen_option, " a dog", ("a dog", "C"), 1),
        (metrics.chosen_option, "I say the option is a dog.", ("a dog", "C"), 1),
        (metrics.chosen_option, "I say the option is", ("a dog", "C"), 0),
        (metrics.chosen_option, "My answer is: a dog", ("a dog", "C"), 1),
        (metrics.chosen_option, "probably, if pressed, D", ("a dog", "C"), 0),
        (metrics.chosen_option, "", ("a dog", "C"), 0),
        (metrics.named_speaker, "It is Rose: surely", ("ROSE",), 1),
        (metrics.named_speaker, "It is Rosemary", ("ROSE",), 1),
        (metrics.named_speaker, "Commander Bill Ecker", ("STAMP PAID", "BILL ECKER"), 1),
        (metrics.named_speaker, "It is Stamp Paid.", ("STAMP PAID",), 1),
        (metrics.named_speaker, "It is Rose", ("STAMP PAID",), 0),
        (metrics.word_f1, "The red dog!", ("a red cat", "nothing"), 0.5),
        (metrics.word_f1, "", ("a red cat",), 0),
        (metrics.character_f1, "红 狗。", ("红猫",), 0.5),
        (metrics.number_share, "Paragraph 3 or 4", ("Paragraph 3",), 0.5),
        (metrics.number_share, "no idea", ("Paragraph 3",), 0),
        (metrics.code_similarity, "# comment\nx = 1\ny = 2", ("x = 1",), 1),
        (metrics.all_contained, "They are 12 and 34.", ("12", "34", "56"), 2 / 3),
        (metrics.any_contained, "It was PARIS.", ("Rome", "Paris"), 1),
    ],
)
def test_value(metric, output, answers, expected):
    assert score(metric, output, *answers) == pytest.approx(expected)


def test_rouge_l_takes_words_once_and_sentences_apart():
    # "the cat sat" / "the dog sat": common words the, sat; three words each
    assert score(metrics.rouge_l, "the cat sat.", "the dog sat.") == pytest.approx(2 / 3)
    # repeated words count once: {the, cat} of {the, cat} and {the, cat, sat}
    assert score(metrics.rouge_l, "the the cat", "the cat sat") == pytest.approx(0.8)
    assert score(metrics.rouge_l, "", "the cat") == 0


def test_rouge_l_sum_joins_the_lines_and_counts_each_word_as_often_as_it_stands():
    # the example of Lin 2004, section 3.2: union of "w1 w2" and "w1 w3 w5" is 4 of 5 words
    got = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"
    recall, precision = 4 / 5, 4 / 10
    assert score(metrics.rouge_l_sum, got, "w1 w2 w3 w4 w5") == pytest.approx(
        2 * recall * precision / (recall + precision)
    )
    assert score(metrics.rouge_l_sum, "One, two!", "one two") == 1


def test_label_share_counts_the_labels_named_but_not_parts_of_the_right_one():
    labels = ("Food", "Food plant", "Animal")
    assert score(metrics.label_share, "Food plant", "Food plant", labels=labels) == 1
    assert score(metrics.label_share, "Animal or Food plant", "Food plant", labels=labels) == 0.5
    assert score(metrics.label_share, "Animal", "Food plant", labels=labels) == 0


def test_few_shot_tasks_are_scored_by_their_first_line():
    assert score(partial(metrics.of_first_line, metrics.word_f1), "\nParis\nQuestion: more", "Paris") == 1


def test_babilong_wants_the_only_label_of_the_first_sentence():
    labels = ("kitchen", "garden", "office")
    ask = {"labels": labels, "question": "Where was the apple before the kitchen?"}
    assert score(metrics.only_label, "Before the kitchen it was in the Garden. Office.", "garden", **ask) == 1
    assert score(metrics.only_label, "garden or office", "garden", **ask) == 0
    assert score(metrics.only_label, "office", "garden", **ask) == 0


def test_math_calc_takes_answers_with_and_without_the_first_operand():
    def of(output, document="1 + 3 + 4 - 2", answers=("4", "8", "6")):
        return metrics.leading_values(output, Example("task", "", document, "", "", answers, 8))

    assert of("[1, 4, 8, 6]") == of("[4, 8, 6]") == 1
    assert of("[1, 4, 9, 6]") == of("4, 9, 6") == pytest.approx(1 / 3)
    assert of("[2, 4, 8, 6]") == of("") == 0
    assert of("[5, 7]", "5 + 0 + 2", ("5", "7")) == of("[5, 5, 7]", "5 + 0 + 2", ("5", "7")) == 1
