"""Models in half precision are told from models that do something else, though their numbers are rounded."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qllm_runtime.errors import UnsupportedModelError
from qllm_runtime.rotary import learn_layout
from qllm_runtime.seam import examine

DIM = 64
ANGLES = torch.linspace(0.1, 3.0, DIM // 2).repeat(2)


def half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def arrivals(heads: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same heads without a turn, with a quarter turn and with an angle per column, each of them rounded."""
    turned = heads * ANGLES.cos() + half_turned(heads) * ANGLES.sin()
    return [x.to(dtype).float() for x in (heads, half_turned(heads), turned)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [0.0, 5.0, 50.0])
def test_dimensions_of_one_pair_may_be_of_different_size(dtype, spread):
    torch.manual_seed(0)
    heads = torch.randn(64, DIM) + spread * torch.randn(DIM)
    layout = learn_layout(*arrivals(heads, dtype), ANGLES.cos(), ANGLES.sin())
    assert layout is not None
    assert layout.columns == tuple(range(DIM // 2)) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_after_the_rotation_is_none(dtype):
    torch.manual_seed(0)
    weight = 1 + 0.3 * torch.randn(DIM)
    plain, quarter, turned = (x * weight for x in arrivals(torch.randn(64, DIM), dtype))
    with pytest.raises(ValueError, match="not a rotation"):
        learn_layout(plain, quarter, turned, ANGLES.cos(), ANGLES.sin())


def deep() -> PreTrainedModel:
    """Sixteen layers whose routers choose other experts after a rounding."""
    kind, settings = architectures.SUPPORTED["deepseek_v3"]
    sizes = {"hidden_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = AutoConfig.for_model(
        kind, **{**architectures._BASE, **settings, **sizes, "n_routed_experts": 32, "num_experts_per_tok": 4}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).half().eval()


def test_experts_that_a_rounding_exchanges_are_no_reason_to_refuse():
    assert examine(deep()).layers


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_an_attention_that_does_more_is(name):
    def halved(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return 0.5 * sdpa_attention_forward(*args, **kwargs)[0], None

    AttentionInterface.register("halved", halved)
    model = architectures.build(*architectures.SUPPORTED[name]).half()
    model.set_attn_implementation("halved")
    with pytest.raises(UnsupportedModelError, match="other logits"):
        examine(model)
