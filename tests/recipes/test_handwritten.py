"""Questions by authors who had not seen the recipe."""

from __future__ import annotations

import random

import pytest

from qllm_bench.questions.data import Prose, is_exact
from qllm_bench.questions.facts import ABSENT
from qllm_bench.questions.wordings import wordings
from recipes import handwritten

PROSE = Prose.of("It rained all day. The road was long. " * 60)


@pytest.mark.parametrize("name", list(handwritten.FILES))
def test_questions_can_be_answered_from_their_statements(name: str) -> None:
    written = handwritten.read(name)
    assert len(written) == 120
    for n, one in enumerate(written):
        case = one.case(random.Random(n), PROSE, 1200)
        assert case == one.case(random.Random(n), PROSE, 1200)
        assert tuple(case.document[a:b] for a, b in case.spans) == one.statements
        assert all(sentence in case.document for sentence in one.distractors)
        assert bool(one.answers) == bool(one.statements) == (one.family != "absent")
        assert all(any(answer in s for s in one.statements) for answer in one.answers)
        assert not any(answer in s for s in one.distractors for answer in one.answers)
        right = " ".join(one.statements) if one.statements else ABSENT
        assert is_exact(case.answer, case.answer, case.values)
        assert len(case.answer) < len(right) or case.answer == right
        assert not one.answers or not is_exact(ABSENT, case.answer, case.values)


def test_no_wording_of_theirs_is_used_in_training() -> None:
    told = {s for w in wordings(False) for s in w.statements}
    for name in handwritten.FILES:
        assert not {s for one in handwritten.read(name) for s in one.statements} & told
