"""The engine's whole path on Triton kernels gives what it gives on the torch functions."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qllm_kernels import dispatch
from qllm_runtime.config import MemoryConfig
from qllm_runtime.inference import Inference


def run(inference: Inference, config: MemoryConfig, ids: torch.Tensor) -> list[torch.Tensor]:
    dispatch.backend.cache_clear()
    with inference.request():
        cache = inference.cache(config, reserve=len(ids))
        inference.read(cache, [ids[:-3]], config)
        return [inference.step(cache, [int(token)])[0] for token in ids[-3:]]


@pytest.mark.parametrize(("policy", "selection"), [("qllm", "per_kv_head"), ("infllm", "shared")])
def test_engine(monkeypatch: pytest.MonkeyPatch, policy: str, selection: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
    config = MemoryConfig(
        policy=policy, selection=selection, n_init=4, n_local=32, block_size=8, topk=2, repr_topk=2, exec_block_size=16,
        chunk_size=48,
    )  # fmt: skip
    ids = torch.randint(0, 64, (102,))
    inference = Inference(model)
    expected = run(inference, config, ids)
    served = {"choose_blocks": 0, "attend_pieces": 0, "linear_top_keys": 0}
    modules = ("select", "attention", "summary")
    for name, module in zip(served, modules, strict=True):
        gpu = __import__(f"qllm_kernels.gpu.{module}", fromlist=[name])
        real = getattr(gpu, name)

        def counted(*args, name=name, real=real, **options):
            served[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(gpu, name, counted)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    actual = run(inference, config, ids)
    dispatch.backend.cache_clear()
    assert all(served.values())
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
