"""Kernels compiled for GPUs that are not there, within what `budgets.json` says they take.

`compile_all.py` wrote the table from all cases of `cases.py`. Here the table is checked as a whole, and a few of its rows,
every GPU and type of number among them, are compiled again. Compilers differ in what they take, so only the version of Triton
that the table names is held to its numbers; what a GPU has is the limit for all.
"""

from __future__ import annotations

import pytest
from cases import AGAIN, ARCHS, AXES, KERNELS, SHARED, counts, covering, multiplies

pytest.importorskip("triton")
from compile_all import TRITON, read

MADE_WITH, TABLE = read()


def test_the_table_is_whole():
    assert TABLE.keys() == KERNELS.keys()
    for name, rows in TABLE.items():
        assert set(rows) == {case.label for case in covering(name)}, name


def test_nothing_exceeds_a_gpu():
    for name, rows in TABLE.items():
        for case in covering(name):
            registers, shared, matrix = rows[case.label]
            assert registers <= 255 and shared <= SHARED[case.arch], (name, case.label)
            assert matrix > 0 or not multiplies(name), (name, case.label)


@pytest.mark.parametrize("case", AGAIN, ids=lambda case: f"{case.name} {case.label}")
def test_budget(case):
    usage = KERNELS[case.name](case).usage(case.arch)
    assert usage.spilled == 0
    assert usage.shared <= SHARED[case.arch]
    if TRITON == MADE_WITH:
        registers, shared, _ = TABLE[case.name][case.label]
        assert usage.registers <= registers + 8  # another release of the compiler may take a few more
        assert usage.shared <= shared
    assert usage.counted == counts(case.name)
    if multiplies(case.name):
        assert usage.matrix > 0
        assert usage.warp_groups or "prefill" not in case.name or case.arch not in (90, 100)


def test_cases_meet_every_value():
    for name, axes in AXES.items():
        cases = covering(name)
        assert {case.arch for case in cases} == set(ARCHS)
        if name.startswith("segment_attention"):
            assert len({(case.dtype, case.dim) for case in cases}) == 15
        assert all(len({getattr(case, axis) for case in cases}) > 1 for axis in axes)
