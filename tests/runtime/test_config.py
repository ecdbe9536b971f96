"""MemoryConfig: what fits together, defaults for models, files of the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError, QLLMError

# the form of the published code's files
PUBLISHED = """
model:
  type: {type}
  path: somebody/Some-Model
  block_size: 64
  n_init: 128
  n_local: 512
  topk: 8
  repr_topk: 4
  max_cached_block: 32
  exc_block_size: 256
  fattn: false
  base: 1000000
  distance_scale: 1.0
  question_weight: 4

max_len: 2147483647
chunk_size: 8192
conv_type: some-model
truncation: suffix
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "memory.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_init": -1}, "n_init"),
        ({"n_local": 0}, "n_local"),
        ({"block_size": 0}, "block_size"),
        ({"topk": -1}, "topk"),
        ({"topk": 0}, "lm-infinite"),
        ({"repr_topk": 0}, "repr_topk"),
        ({"repr_topk": 65}, "block_size"),
        ({"exec_block_size": 0}, "exec_block_size"),
        ({"exec_block_size": 2048}, "n_local"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"query_weight": -0.5}, "query_weight"),
        ({"query_weight": float("nan")}, "query_weight"),
        ({"query_weight": float("inf")}, "query_weight"),
        ({"policy": "magic"}, "policy"),
        ({"selection": "each"}, "selection"),
        ({"summary": "median"}, "summary"),
        ({"n_local": "many"}, "n_local"),
        ({"n_local": 12.5}, "n_local"),
        ({"n_locals": 12}, "n_locals"),
        ({"faithful": True, "summary": "max"}, "faithful"),
        ({"faithful": True, "selection": "per_kv_head"}, "faithful"),
        ({"faithful": True, "policy": "full"}, "faithful"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message) as refusal:
        MemoryConfig(**settings)
    assert isinstance(refusal.value, QLLMError | ValueError)
    with pytest.raises(InvalidConfigError, match=message):
        MemoryConfig().replace(**settings)


def test_frozen_and_replaced() -> None:
    config = MemoryConfig(n_local=512)
    with pytest.raises(ValidationError):
        config.n_local = 3  # type: ignore[misc]
    assert config.replace(topk=3) == MemoryConfig(n_local=512, topk=3)
    assert hash(config) == hash(MemoryConfig(n_local=512))
    assert MemoryConfig(faithful=True).summary == "published"
    assert all(field.description for field in MemoryConfig.model_fields.values())


def test_defaults_follow_from_values_as_they_are_understood() -> None:
    for size in (64, 64.0, "64"):
        assert MemoryConfig(block_size=size).repr_topk == 64  # type: ignore[arg-type]
        assert MemoryConfig(block_size=size, summary="mean").repr_topk == 4  # type: ignore[arg-type]
    assert MemoryConfig(block_size=2, summary="mean").repr_topk == 2
    for faithful in (True, "true", 1):
        config = MemoryConfig(faithful=faithful)  # type: ignore[arg-type]
        assert (config.summary, config.repr_topk) == ("published", 4)
    config = MemoryConfig(faithful="false")  # type: ignore[arg-type]
    assert (config.summary, config.repr_topk) == ("max", 64)
    assert "repr_topk" not in config.model_fields_set
    assert MemoryConfig(**config.model_dump()) == config


def test_what_was_never_given_follows_the_changes() -> None:
    assert MemoryConfig(summary="mean").replace(block_size=2).repr_topk == 2
    for policy in ("full", "streaming"):
        blocks = MemoryConfig(policy=policy).replace(block_size=128).replace(policy="qllm")  # type: ignore[arg-type]
        assert blocks == MemoryConfig(block_size=128)
        assert blocks.every_key
    assert MemoryConfig().replace(faithful=True) == MemoryConfig(faithful=True)
    assert MemoryConfig(repr_topk=8, block_size=8).replace(block_size=16).every_key  # it was every key, it stays so
    assert MemoryConfig(repr_topk=4).replace(block_size=16).repr_topk == 4


def test_policies_without_blocks_need_no_block_settings() -> None:
    for policy in ("streaming", "lm-infinite", "full"):
        config = MemoryConfig(policy=policy, topk=0, n_local=8)  # exec_block_size is larger
        assert not config.uses_blocks
        assert config.window == 8
    assert MemoryConfig(n_local=512, topk=4, block_size=32).window == 512 + 128


@pytest.mark.parametrize("trained", [1, 64, 100, 256, 500, 512, 1024, 2048, 4096, 8192, 32768, 131072, 1_048_576])
def test_defaults_fit_the_model(trained: int) -> None:
    config = MemoryConfig.for_model(trained)
    assert config.policy == "qllm"
    assert config.n_local <= max(64, trained // 2)
    assert config.window <= max(192, 3 * trained // 2)
    assert config.chunk_size >= config.exec_block_size
    assert MemoryConfig.for_model(trained, policy="streaming", n_init=3).n_init == 3
    with pytest.raises(InvalidConfigError):
        MemoryConfig.for_model(trained, n_local=0)


@pytest.mark.parametrize("trained", [128, 512, 4096, 131072])
def test_sizes_that_were_not_given_fit_the_model(trained: int) -> None:
    sizes = MemoryConfig.for_model(trained)
    assert MemoryConfig().fitted(trained) == sizes
    assert sizes.fitted(trained) == sizes
    assert MemoryConfig(policy="infllm", topk=3).fitted(trained) == sizes.replace(policy="infllm", topk=3)
    assert MemoryConfig(n_local=16).fitted(trained) == sizes.replace(n_local=16, exec_block_size=16)
    assert MemoryConfig(repr_topk=64).fitted(trained).block_size == 64
    assert MemoryConfig(repr_topk=4).fitted(trained) == sizes.replace(repr_topk=4)
    assert MemoryConfig(device_blocks=64).fitted(trained).topk == min(sizes.topk, 16)
    assert MemoryConfig(faithful=True).fitted(trained) == MemoryConfig(faithful=True)


def test_values_that_were_given_are_kept_or_refused() -> None:
    assert MemoryConfig(n_local=2048, exec_block_size=2048).fitted(512).n_local == 2048
    with pytest.raises(InvalidConfigError, match=r"exec_block_size \(512\) must not exceed n_local \(256\)"):
        MemoryConfig(exec_block_size=512).fitted(512)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("qllm", "qllm"), ("inf-llm", "infllm"), ("stream-llm", "streaming"), ("infinite-lm", "lm-infinite")],
)
@pytest.mark.parametrize("faithful", [False, True])
def test_published_files(tmp_path: Path, kind: str, policy: str, faithful: bool) -> None:
    config = MemoryConfig.from_yaml(file(tmp_path, PUBLISHED.format(type=kind)), faithful=faithful)
    assert config == MemoryConfig(
        policy=policy,  # type: ignore[arg-type]
        n_init=128,
        n_local=512,
        block_size=64,
        topk=8,
        repr_topk=4,
        exec_block_size=256,
        query_weight=4,
        rope_theta=1_000_000,
        summary="published",
        chunk_size=8192,
        faithful=faithful,
    )


def test_our_own_names_and_overrides(tmp_path: Path) -> None:
    path = file(tmp_path, "policy: infllm\nn_local: 256\nsummary: mean\n")
    assert MemoryConfig.from_yaml(path) == MemoryConfig(policy="infllm", n_local=256, summary="mean")
    assert MemoryConfig.from_yaml(str(path), n_local=300).n_local == 300
    whole = MemoryConfig.from_yaml(file(tmp_path, PUBLISHED.format(type="qllm").replace("8192", "null")))
    assert whole.chunk_size > 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mapping"),
        ("- a\n- b", "mapping"),
        ("n_local: [", "Cannot read"),
        ("n_locals: 3", "n_locals"),
        ("n_local: -3", "n_local"),
        ("1: 2", "1"),
        (PUBLISHED.format(type="retrieval"), "retrieval"),
        (PUBLISHED.format(type="qllm").replace("distance_scale: 1.0", "distance_scale: 2.0"), "distance_scale"),
        (PUBLISHED.format(type="qllm").replace("fattn: false", "perhead: true"), "perhead"),
        (PUBLISHED.format(type="qllm") + "n_local: 99\nfoo: bar\n", "'n_local', 'foo' beside 'model'"),
    ],
    ids=range(10),
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        MemoryConfig.from_yaml(file(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="Cannot read"):
        MemoryConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(InvalidConfigError, match="Cannot read"):
        MemoryConfig.from_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"policy: \xe9")
    with pytest.raises(InvalidConfigError, match="Cannot read"):
        MemoryConfig.from_yaml(tmp_path / "latin.yaml")
