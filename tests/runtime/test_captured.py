"""Recorded steps as far as they go without a GPU and without kernels; the rest is tests/kernels/test_triton_captured.py."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

from qllm_kernels import dispatch
from qllm_runtime import captured
from qllm_runtime.captured import CapturedSteps
from qllm_runtime.inference import Inference


def test_nothing_is_recorded_on_a_cpu():
    assert captured.recorder(tiny.model()) is None


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The modes that torch is set to, as on a GPU."""
    found: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    return found


def test_what_waits_is_found_and_other_warnings_pass(modes):
    with warnings.catch_warnings(record=True) as passed:
        warnings.simplefilter("always")
        with captured._waiting(torch.device("cuda")) as found:
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert found == ["called a synchronizing CUDA operation (Triggered internally)"]
    assert [str(w.message) for w in passed] == ["something else"]
    assert modes == ["warn", 0]


def test_a_step_that_waits_is_never_recorded(monkeypatch):
    """One warning, and the step it was found in counts."""
    inference = Inference(tiny.model())

    def record(step: object, before: object) -> None:
        raise AssertionError("recorded")

    found = ["called a synchronizing CUDA operation"]
    monkeypatch.setattr(captured, "_waiting", lambda device: _Given(found))
    steps = CapturedSteps(inference.model, record)
    monkeypatch.setattr(CapturedSteps, "_forward", lambda self, cache: torch.zeros(1, 3))
    dispatch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="LlamaForCausalLM run launch by launch.*synchronizing"):
        assert steps._run(None, (1,)).shape == (1, 3)
    assert steps.step(None, 0) is None


class _Given:
    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __enter__(self) -> list[str]:
        return self._found

    def __exit__(self, *exc: object) -> None:
        pass
