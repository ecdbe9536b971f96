"""Models from folders that are whole, and from folders that are not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qllm_runtime import loading
from qllm_runtime.errors import InvalidConfigError, ModelNotFoundError, OutOfMemoryError, UnsupportedModelError
from qllm_runtime.loading import _check_complete, load

Edit = Callable[[Path], Any]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.model().save_pretrained(tmp_path)
    return tmp_path


def configured(**settings: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return edit


def without(*names: str) -> Edit:
    """Leave weights out."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = {name: weight for name, weight in load_file(file).items() if name not in names}
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def written(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def removed(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("lm_head.weight"), r"1 of its weights are missing: lm_head\.weight\. Download"),
        (without(Q, "model.norm.weight"), rf"2 of its weights are missing: {Q}, model\.norm\.weight"),
        (configured(num_hidden_layers=3), r"9 of its weights .*: model\.layers\.2\.\S+, \S+, \S+, \.\.\."),
        (configured(vocab_size=300), r"other shapes .*: lm_head\.weight \[264, 32\] instead of \[300, 32\]"),
        (configured(hidden_size="256"), "configuration of .*'hidden_size'.* expected int"),
        (configured(num_attention_heads=0), "Cannot load the configuration of .*ZeroDivisionError"),
        (configured(rope_parameters={"rope_type": "spiral"}), "spiral"),
        (written("tokenizer.json", "{}"), "Cannot load the tokenizer of "),
        (written("tokenizer.json", "{"), "Cannot load the tokenizer of "),
        (written("tokenizer_config.json", "[]"), "Cannot load the tokenizer of "),
        (removed("tokenizer.json"), r"Cannot load the tokenizer of .*\. Put its files \(tokenizer\.json"),
        (removed("tokenizer.json", "tokenizer_config.json"), "Cannot load the tokenizer of "),
        (removed("model.safetensors"), r"model\.safetensors"),
        (written("generation_config.json", "[]"), "Cannot load .*TypeError"),
        (
            lambda folder: (removed("model.safetensors")(folder), written("pytorch_model.bin", "x")(folder)),
            "Cannot load",
        ),
    ],
)
def test_what_is_broken_is_named(folder: Path, edit: Edit, message: str) -> None:
    edit(folder)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_causal_language_model(folder: Path) -> None:
    removed("tokenizer.json", "tokenizer_config.json")(folder)
    written("config.json", '{"model_type": "vit"}')(folder)
    with pytest.raises(UnsupportedModelError, match=r"not a causal language model .*'vit'"):
        load(folder)


def test_tied_weights_are_not_missing(folder: Path) -> None:
    without("lm_head.weight")(folder)
    configured(tie_word_embeddings=True)(folder)
    network: Any = load(folder).inference.model
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert torch.equal(network.lm_head.weight, tiny.model().model.embed_tokens.weight)
    without("model.embed_tokens.weight")(folder)
    del network
    with pytest.raises(ModelNotFoundError, match="embed_tokens"):
        load(folder)


def test_buffers_may_be_missing() -> None:
    network: Any = torch.nn.BatchNorm1d(2)
    _check_complete("m", network, {"missing_keys": {"running_mean"}, "mismatched_keys": set()})
    with pytest.raises(ModelNotFoundError, match="weights are missing: bias"):
        _check_complete("m", network, {"missing_keys": {"running_mean", "bias"}, "mismatched_keys": set()})


def test_memory_that_runs_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("qllm_runtime.loading.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(OutOfMemoryError, match="do not fit on cpu: MemoryError"):
        load(folder)


def test_no_bar_of_weights(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as transformers_logging

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **kwargs)

    transformers_logging.set_tqdm_hook(hook)
    try:
        load(folder)
    finally:
        assert transformers_logging.set_tqdm_hook(None) is hook
    assert capfd.readouterr().err == ""


def test_one_device_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert loading._device("auto") == loading._device("cuda") == torch.device("cuda", 1)
    assert loading._device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(InvalidConfigError, match="has 2 usable CUDA devices"):
        loading._device("cuda:2")
    with pytest.raises(InvalidConfigError, match="Unknown device None"):
        loading._device(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["auto", "bfloat16"])
def test_the_dtype_of_the_checkpoint_is_shared(folder: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    configured(dtype="bfloat16")(folder)
    # as on a GPU
    monkeypatch.setattr(loading, "_dtype", lambda dtype, _: dtype if dtype == "auto" else torch.bfloat16)
    kept = load(folder, dtype=first)
    assert load(folder, dtype="auto") is load(folder, dtype="bfloat16") is kept


def test_the_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    kept = load(folder)
    monkeypatch.chdir(folder.parent)
    assert load(f"~/{folder.name}") is load(f"./{folder.name}") is kept


def test_what_is_loaded_does_not_wait_for_a_download(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load(folder)
    begun, go_on = threading.Event(), threading.Event()

    def download(where: str, _: Any) -> None:
        begun.set()
        go_on.wait(60)
        raise ModelNotFoundError(where)

    def other() -> None:
        with pytest.raises(ModelNotFoundError):
            load("some/other")

    monkeypatch.setattr(loading, "_config", download)
    thread, asking = threading.Thread(target=other), threading.Thread(target=load, args=(folder,))
    thread.start()
    begun.wait(60)
    asking.start()
    asking.join(20)
    waits = asking.is_alive()
    go_on.set()
    thread.join()
    asking.join()
    assert not waits and load(folder) is kept
