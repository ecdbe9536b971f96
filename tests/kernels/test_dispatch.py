"""The choice between torch functions and Triton kernels."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from qllm_kernels import dispatch, select

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    dispatch.backend.cache_clear()
    dispatch.warn_once.cache_clear()
    yield
    dispatch.backend.cache_clear()
    dispatch.warn_once.cache_clear()


def test_cpu_stays_with_torch(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.backend(CPU) == "torch"


def test_triton_is_not_imported_for_the_cpu():
    code = """if True:
        import sys, torch
        loaded = {name.partition(".")[0] for name in sys.modules}
        from qllm_kernels import dispatch
        dispatch.block_scores(torch.zeros(1, 2, 4), torch.zeros(1, 1, 3, 4), scopes=1)
        assert "triton" in loaded or "triton" not in sys.modules
        assert not any(name.startswith("qllm_kernels.gpu") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_unknown_value(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'torch', 'triton' or leave it unset"):
        dispatch.backend(CPU)


def test_without_triton_torch_serves_with_one_warning(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    with pytest.warns(RuntimeWarning, match="triton cannot be imported"):
        assert dispatch.backend(CPU) == "torch"
    dispatch.backend.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.backend(CPU) == "torch"


def test_override(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.backend(torch.device("cuda")) == "torch"


def test_an_old_gpu_is_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"compute capability 7\.5 is below 8\.0"):
        assert dispatch.backend(torch.device("cuda")) == "torch"


def test_refused_shapes_go_to_torch_with_one_warning(monkeypatch):
    class Refusing:
        @staticmethod
        def cannot_serve(*args):
            return "head size 512 is above 256"

    monkeypatch.setattr(dispatch, "_kernels", lambda name, device: Refusing)
    lookup, summaries = torch.ones(1, 1, 4), torch.arange(12.0).view(1, 1, 3, 4)
    with pytest.warns(RuntimeWarning, match="block_scores: head size 512"):
        dispatch.block_scores(lookup, summaries, scopes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = dispatch.block_scores(lookup, summaries, scopes=1)
    assert torch.equal(scores, select.block_scores(lookup, summaries, scopes=1))
