"""Recorded steps as far as they go without a GPU and without kernels; the rest is tests/kernels/test_triton_captured.py."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

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
    """One warning, and the steps it was found in count."""
    inference = Inference(tiny.model())

    def record(step: object, before: object) -> None:
        raise AssertionError("recorded")

    found = ["called a synchronizing CUDA operation"]
    monkeypatch.setattr(captured, "_waiting", lambda device: _Given(found))
    steps = CapturedSteps(inference.model, record)
    monkeypatch.setattr(CapturedSteps, "_forward", lambda self, cache: torch.zeros(1, 3))
    dispatch.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps._run(None, (1,)).shape == (1, 3)
    with pytest.warns(RuntimeWarning, match="LlamaForCausalLM run launch by launch.*synchronizing"):
        assert steps._run(None, (1,)).shape == (1, 3)
    assert steps.step(None, 0) is None


def test_what_waits_once_may_be_another_thread(monkeypatch):
    """A warning that only the first step meets does not keep later ones from being recorded."""
    inference = Inference(tiny.model())
    found = iter([["called a synchronizing CUDA operation"], []])
    monkeypatch.setattr(captured, "_waiting", lambda device: _Given(next(found)))
    monkeypatch.setattr(CapturedSteps, "_forward", lambda self, cache: torch.zeros(1, 3))
    steps = CapturedSteps(inference.model, lambda step, before: _Recorded(step()))
    for recorded in (False, False, True):
        steps._run(None, (1,))
        assert steps.recorded == recorded


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of torch, as on a GPU: the calls in order, with streams that are entered and left."""
    calls: list[str] = []

    class Graph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            calls.append(f"begin {capture_error_mode} {pool}")

        def capture_end(self) -> None:
            calls.append("end")

        def pool(self) -> str:
            return "pool"

    @contextlib.contextmanager
    def on(name: str) -> Iterator[None]:
        calls.append(f"to {name}")
        yield
        calls.append(f"from {name}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on("stream"))
    monkeypatch.setattr(captured, "_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * captured._SPARE, 3 * captured._SPARE))
    yield calls
    captured._failed.clear()


GPU = torch.device("cuda", 0)


def test_a_recording_takes_no_memory_from_what_is_in_reserve(cuda, monkeypatch):
    def step() -> torch.Tensor:
        cuda.append("step")
        return torch.zeros(1)

    first = captured.CudaGraph(GPU, step, None)
    assert cuda == ["to stream", "synchronize", "begin thread_local None", "step", "end", "from stream"]
    cuda.clear()
    captured.CudaGraph(GPU, step, first)
    assert "begin thread_local pool" in cuda
    cuda.clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (captured._SPARE - 1, 3 * captured._SPARE))
    captured.CudaGraph(GPU, step, None)
    assert cuda[:4] == ["to stream", "synchronize", "empty", "begin thread_local None"]
    assert not captured._failed


def test_a_recording_that_fails_is_ended(cuda):
    def step() -> torch.Tensor:
        raise RuntimeError("not in a capture")

    with pytest.raises(RuntimeError, match="not in a capture"):
        captured.CudaGraph(GPU, step, None)
    assert cuda[-1] == "end" and captured._failed == {GPU}
    assert not captured._capturing.locked()


class _Recorded:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def replay(self) -> None:
        pass


class _Given:
    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __enter__(self) -> list[str]:
        return self._found

    def __exit__(self, *exc: object) -> None:
        pass
