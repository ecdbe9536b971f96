"""Models in whatever state their owners keep them: compiled, in training, used by others, pruned, offloaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, WIDE, assert_same, build, stock, text
from transformers import PreTrainedModel

from qllm_runtime.engine import QLLM
from qllm_runtime.errors import InvalidRequestError, UnsupportedModelError
from qllm_runtime.hooks import evaluating
from qllm_runtime.inference import Inference


def last_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    inference = Inference.of(model)
    with inference.request():
        cache = inference.cache(WIDE)
        inference.read(cache, [ids[0, :-1]], WIDE)
        return inference.step(cache, [int(ids[0, -1])])


# ---------------------------------------------------------------------- compiled


def by_method(model: PreTrainedModel, backend: Any) -> None:
    model.compile(backend=backend)


def by_forward(model: PreTrainedModel, backend: Any) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


@pytest.mark.parametrize("how", [by_method, by_forward])
def test_compiled_models_run_eagerly(how: Callable[[PreTrainedModel, Any], None]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build("llama", {"num_hidden_layers": 2})
    ids = text(model, 40)
    expected = stock(model, ids)
    how(model, backend)
    torch._dynamo.reset()
    assert_same(last_logits(model, ids), expected[:, -1])
    assert not graphs
    assert_same(stock(model, ids), expected)
    assert graphs


def test_compiled_models_of_several_threads() -> None:
    """Whoever leaves first does not compile for the other; the last one leaves things as they were."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Sine(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + 1

    modules = [Sine(), Sine()]
    for module in modules:
        module.compile(backend=backend)
    first, second = map(evaluating, modules)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    modules[1](torch.ones(2))
    assert not graphs
    second.__exit__(None, None, None)
    modules[1](torch.ones(2))
    assert graphs


# ---------------------------------------------------------------------- in training, in use


def test_models_in_training_are_examined() -> None:
    model = build("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}).train()
    assert len(Inference.of(model).facts.layers) == 4
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("part", ["whole", "rotary"])
def test_calls_by_others_while_a_request_is_under_way(part: str) -> None:
    model = build(*SUPPORTED["llama"])
    ids = text(model, 20)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            if part == "whole":
                stock(model, ids)
            else:  # one that began before the request
                model.model.rotary_emb(torch.zeros(1, 4, 64), torch.arange(4)[None])
        except InvalidRequestError as error:
            caught.append(error)

    def elsewhere(*_: int) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    expected = QLLM(model, memory=WIDE).generate(ids, max_tokens=2)
    assert QLLM(model, memory=WIDE).generate(ids, max_tokens=2, progress=elsewhere) == expected
    assert caught
    assert all("while it answers a request" in str(error) for error in caught)
    caught.clear()
    elsewhere()
    assert not caught


# ---------------------------------------------------------------------- weights


def test_a_weight_of_zero_in_a_norm_of_queries() -> None:
    model = build(*SUPPORTED["qwen3"])
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data[3] = layer.self_attn.k_norm.weight.data[11] = 0
    ids = text(model, 40)
    assert_same(last_logits(model, ids), stock(model, ids)[:, -1])


# ---------------------------------------------------------------------- pruned


@pytest.mark.parametrize("renumbered", [False, True])
def test_pruned_models_are_served_once_renumbered(renumbered: bool) -> None:
    model = build("llama", {})
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in (0, 1, 3)])
    model.config.num_hidden_layers = 3
    ids = text(model, 40)
    if not renumbered:
        with pytest.raises(UnsupportedModelError, match=r"layer_idx is 3.* 3 layers.*renumber"):
            last_logits(model, ids)
        return
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    assert_same(last_logits(model, ids), stock(model, ids)[:, -1])


# ---------------------------------------------------------------------- offloaded


class Offloaded:
    """Keeps a module's weights elsewhere but while it computes, as accelerate does for a device_map with "cpu" or "disk"."""

    execution_device = torch.device("cpu")

    def __init__(self, module: Any) -> None:
        self._kept = {name: weight for name, weight in module._parameters.items() if weight is not None}
        self._away = {name: torch.nn.Parameter(x.to("meta"), requires_grad=False) for name, x in self._kept.items()}
        self._module, self._forward = module, module.forward
        module._parameters.update(self._away)
        module._hf_hook, module.forward = self, self.forward

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        module._parameters.update(self._kept)
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        module._parameters.update(self._away)
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.pre_forward(self._module)
        return self.post_forward(self._module, self._forward(*args, **kwargs))


def offload(part: torch.nn.Module) -> None:
    for module in part.modules():
        if any(weight is not None for weight in module._parameters.values()):
            Offloaded(module)


@pytest.mark.parametrize("name", ["llama", "lfm2"])
@pytest.mark.parametrize("part", ["", "model.embed_tokens", "model.layers.2"])
def test_offloaded_weights(name: str, part: str) -> None:
    model = build(*SUPPORTED[name])
    ids = text(model, 40)
    expected = stock(model, ids)
    offload(model.get_submodule(part))
    assert any(weight.is_meta for weight in model.parameters())
    assert_same(last_logits(model, ids), expected[:, -1])
    assert {place.type for place in Inference.of(model).devices} == {"cpu"}


def test_weights_that_were_never_loaded() -> None:
    model = build("llama", {}).to("meta")
    with pytest.raises(UnsupportedModelError, match=r"meta device.*from_pretrained"):
        QLLM(model, memory=WIDE).generate([[5, 6, 7]], max_tokens=1)
