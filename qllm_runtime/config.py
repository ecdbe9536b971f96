"""`MemoryConfig`: how the key/value memory of one request is laid out and looked up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qllm_runtime.errors import InvalidConfigError

Policy = Literal["qllm", "infllm", "streaming", "lm-infinite", "full"]
Selection = Literal["shared", "per_kv_head"]
Summary = Literal["published", "mean", "max"]

# attn_type values of the published YAML configs
_PUBLISHED_POLICIES: dict[str, Policy] = {
    "qllm": "qllm",
    "inf-llm": "infllm",
    "stream-llm": "streaming",
    "infinite-lm": "lm-infinite",
    "origin": "full",
}
_PUBLISHED_REPRESENTATIVES = 4
#: Candidate blocks per looked-up block that a generated token scores exactly (against every key). With 2, answers begin to
#: differ from those of an exact comparison with the whole text.
CANDIDATES = 4
_WHOLE_PROMPT = 2**31  # chunk_size: null of the published configs
# keys of the published configs that steer its caching or its GPU code and have no influence on results
_PUBLISHED_ENGINE_KEYS = frozenset(
    (
        "max_cached_block",
        "cache_strategy",
        "score_decay",
        "async_global_stream",
        "pin_memory",
        "faiss",
        "fattn",
        "path",
        "tokenizer_path",
        "conv_type",
        "type",
        "attn_type",
    )
)
# keys that published files hold beside their `model:` section and that only their evaluation reads
_PUBLISHED_OUTER_KEYS = frozenset(("max_len", "truncation", "conv_type"))
# keys that change results and the only values that are served
_PUBLISHED_FIXED: dict[str, tuple[Any, ...]] = {
    "distance_scale": (None, 1, 1.0),
    "perhead": (None, False),
    "chunk_topk_calc": (None,),
}


class MemoryConfig(BaseModel):
    """Layout and lookup of the block memory (paper sections 3.2 and 3.3; all sizes in tokens unless said otherwise).

    Frozen and validated.
    `QLLM` gives sizes that are not set the values that fit its model (`fitted`), except with `faithful=True`; the defaults
    below are those of a model trained for 2048 tokens. Use `from_yaml` for the configuration files of the published research
    code.

    Raises:
        InvalidConfigError: An unknown setting, or values that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy = Field(
        default="qllm",
        description="Which tokens outside the window stay reachable. qllm: blocks looked up by current tokens and question; "
        "infllm: by current tokens only; streaming and lm-infinite: initial tokens only; full: every token (dense attention).",
    )
    n_init: int = Field(
        default=64, ge=0, description="Initial tokens that always stay visible ('global tokens' G, attention sinks)."
    )
    n_local: int = Field(
        default=1024,
        ge=1,
        description="Local window L: every query sees at least this many preceding tokens, at their true distance.",
    )
    block_size: int = Field(default=64, ge=1, le=4096, description="Tokens per memory block B.")
    topk: int = Field(default=16, ge=0, le=4096, description="Blocks looked up per piece and layer (blocks).")
    repr_topk: int = Field(
        default=_PUBLISHED_REPRESENTATIVES,
        ge=1,
        description="Representative tokens r_k per block (tokens). Unless given: with summary 'max' every key of the block, "
        "else 4 as published.",
    )
    exec_block_size: int = Field(
        default=256, ge=1, description="Queries that share one lookup while reading (a 'piece')."
    )
    query_weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight beta of the question's term in the block score (eq. 7). Both terms are standardised over the "
        "blocks, so that 1 suits every model; with faithful=True they are not, and published values depend on the model.",
    )
    selection: Selection = Field(
        default="shared",
        description="One choice of blocks for all heads of a layer (as published) or one per key/value head.",
    )
    summary: Summary = Field(
        default="max",
        description="What represents a block: 'published' (mean of the repr_topk tokens with most attention mass), "
        "'mean' (of all keys), 'max' (repr_topk single keys, the best match counts; where that is all of them, this holds for "
        "tokens of a question, lookups that many tokens share use the mean, and other single tokens the keys' bounds).",
    )
    chunk_size: int = Field(
        default=2048,
        ge=1,
        description="Tokens per forward pass while reading, rounded down to whole pieces; no effect on results. "
        "With faithful=True it is taken exactly and does affect them, as in the published code.",
    )
    device_blocks: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Blocks of each layer kept on the device (blocks, at least 2 * topk, and 4 * topk where every key "
        "represents its block); all blocks lie in the host's memory and are fetched when looked up, results stay the same. "
        "None: all blocks stay on the device.",
    )
    offload_dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="How the host keeps blocks with device_blocks: 'auto' as the model computes them, 'fp8' as float8_e4m3fn "
        "with a scale per block and head, which halves host memory and transfers and costs accuracy (benchmarks/LOG.md).",
    )
    rope_theta: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Rotary base theta that the settings are meant for ('base' of published files, whose code puts it in "
        "place of the model's); a model of another one is refused. None: any.",
    )
    faithful: bool = Field(
        default=False, description="Reproduce the published research code number for number, quirks included."
    )

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc'])) or 'MemoryConfig'}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            ]
            raise InvalidConfigError("Invalid memory configuration: " + "; ".join(lines)) from None

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All settings. Omits rope_theta when unset, so that dumps (and cache keys made of them) stay what they were."""
        settings: dict[str, Any] = handler(self)
        if self.rope_theta is None:
            settings.pop("rope_theta", None)
        return settings

    @model_validator(mode="after")
    def _fill(self) -> MemoryConfig:
        """Defaults that follow from other fields; these stay unset (`model_fields_set`)."""
        filled = self.__dict__  # the model is frozen
        if self.faithful and "summary" not in self.model_fields_set:
            filled["summary"] = "published"
        if self.uses_blocks and "exec_block_size" not in self.model_fields_set:
            filled["exec_block_size"] = min(self.exec_block_size, self.n_local)
        if "repr_topk" not in self.model_fields_set:
            every_key = self.summary == "max"
            filled["repr_topk"] = self.block_size if every_key else min(self.block_size, _PUBLISHED_REPRESENTATIVES)
        return self

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if self.uses_blocks and self.topk == 0 and not self.faithful:
            raise ValueError(
                f"policy {self.policy!r} needs topk of at least 1; use policy='lm-infinite' for a window without lookups"
            )
        if self.uses_blocks and self.repr_topk > self.block_size:
            raise ValueError(f"repr_topk ({self.repr_topk}) must not exceed block_size ({self.block_size})")
        if self.uses_blocks and self.exec_block_size > self.n_local:
            raise ValueError(f"exec_block_size ({self.exec_block_size}) must not exceed n_local ({self.n_local})")
        if self.device_blocks is not None:
            self._check_offload(self.device_blocks)
        elif self.offload_dtype != "auto":
            raise ValueError(
                "offload_dtype is how blocks are kept by the host; set device_blocks as well, or leave it out"
            )
        if self.faithful and (self.selection, self.summary) != ("shared", "published"):
            raise ValueError("faithful=True implies selection='shared' and summary='published'")
        if self.faithful and self.policy == "full":
            raise ValueError("faithful=True has no counterpart for policy 'full'")
        return self

    def _check_offload(self, device_blocks: int) -> None:
        if not self.uses_blocks or self.faithful:
            raise ValueError("device_blocks needs policy 'qllm' or 'infllm' without faithful=True; leave it out")
        if device_blocks < 2 * self.topk:
            raise ValueError(f"device_blocks ({device_blocks}) must be at least twice topk ({self.topk})")
        if self.every_key and device_blocks < CANDIDATES * self.topk:
            raise ValueError(
                f"device_blocks ({device_blocks}) must be at least {CANDIDATES} times topk ({self.topk}) where every key "
                f"represents its block (that many are scored exactly); or set repr_topk below {self.block_size}"
            )

    @property
    def uses_blocks(self) -> bool:
        """Whether evicted tokens are kept as blocks that can be looked up."""
        return self.policy in ("qllm", "infllm")

    @property
    def every_key(self) -> bool:
        """Whether every key represents its block for tokens of a question; others are compared with its mean or its bounds."""
        return self.uses_blocks and self.summary == "max" and self.repr_topk == self.block_size

    @property
    def window(self) -> int:
        """Attention window in tokens: local window plus looked-up blocks."""
        return self.n_local + (self.topk * self.block_size if self.uses_blocks else 0)

    def replace(self, **changes: Any) -> MemoryConfig:
        """A validated copy with some fields changed; where every key represents its block, it keeps doing so.

        Fields that were never given follow from the others anew.

        Raises:
            InvalidConfigError: An unknown setting, or values that contradict each other.
        """
        kept = self.model_dump(exclude_unset=True, exclude={"repr_topk"} if self.every_key else None)
        return MemoryConfig(**{**kept, **changes})

    def fitted(self, max_position_embeddings: int) -> MemoryConfig:
        """The sizes that were given, and for those that were not the ones that fit a model (`for_model`).

        Unchanged with `faithful=True`: the published code has no notion of a model's length.

        Args:
            max_position_embeddings: Length the model was trained for, in tokens.

        Raises:
            InvalidConfigError: Sizes that were given contradict those that fit the model.
        """
        if self.faithful:
            return self
        given = self.model_dump(exclude_unset=True)
        sizes = MemoryConfig.for_model(max_position_embeddings)
        fit = {name: getattr(sizes, name) for name in sizes.model_fields_set}
        if "repr_topk" in given:
            fit["block_size"] = max(sizes.block_size, self.repr_topk)
        if self.device_blocks is not None:
            fit["topk"] = max(1, min(sizes.topk, self.device_blocks // CANDIDATES))
        fit["exec_block_size"] = min(sizes.exec_block_size, given.get("n_local", sizes.n_local))
        return MemoryConfig(**{**fit, **given})

    @classmethod
    def for_model(cls, max_position_embeddings: int, **overrides: Any) -> MemoryConfig:
        """Defaults for a model trained on contexts of `max_position_embeddings` tokens.

        Half of the trained window (at most 4096 tokens) is local, up to twice as much is looked up: positions never leave the
        trained range and the attention cost per token stays constant however long the document is. Every key represents its
        block (`repr_topk == block_size`): with fewer, facts that nothing attended to yet are not found again (docs/results.md).

        Args:
            max_position_embeddings: Length the model was trained for, in tokens.
            **overrides: Fields that win over the defaults.

        Raises:
            InvalidConfigError: An unknown setting, or values that contradict each other.
        """
        n_local = min(4096, max(64, 2 ** int(math.log2(max(128, max_position_embeddings) / 2))))
        block = 64 if n_local >= 1024 else 32
        defaults: dict[str, Any] = {
            "n_init": block,
            "n_local": n_local,
            "block_size": block,
            "topk": min(32, 2 * n_local // block),
            "exec_block_size": min(256, n_local // 2),
            "chunk_size": max(2048, min(8192, 2 * n_local)),
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> MemoryConfig:
        """Read a configuration file of the published code (`model:` section or bare keys) or one of our own field names.

        Of published files, what steers only caching or GPU code of their engine is ignored, and so are `max_len`, `truncation`
        and `conv_type` beside `model:`; `chunk_size` beside it counts. Any other key is an error.

        Args:
            path: The file.
            **overrides: Fields that win over those of the file.

        Raises:
            InvalidConfigError: The file is missing, is not YAML, or has unknown or inconsistent keys.
        """
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidConfigError(f"Cannot read memory configuration {str(path)!r}: {error}") from error
        if not isinstance(raw, dict):
            raise InvalidConfigError(f"{str(path)!r} holds no mapping of settings.")
        published = isinstance(raw.get("model"), dict)
        section: dict[str, Any] = raw
        if published:
            section = {**raw["model"], **{key: raw[key] for key in ("chunk_size",) if key in raw}}
            beside = [repr(key) for key in raw if key not in {"model", "chunk_size", *_PUBLISHED_OUTER_KEYS}]
            if beside:
                raise InvalidConfigError(
                    f"Unknown key {', '.join(beside)} beside 'model' in {str(path)!r}; move settings into that section."
                )
        values: dict[str, Any] = {}
        if "type" in section or "attn_type" in section:
            kind = str(section.get("type", section.get("attn_type")))
            if kind not in _PUBLISHED_POLICIES:
                raise InvalidConfigError(
                    f"Unknown type {kind!r} in {str(path)!r}; expected one of {sorted(_PUBLISHED_POLICIES)}."
                )
            values["policy"] = _PUBLISHED_POLICIES[kind]
            published = True
        if published:
            values["summary"] = "published"
        names = {"question_weight": "query_weight", "exc_block_size": "exec_block_size", "base": "rope_theta"}
        for key, value in section.items():
            name = names.get(key, key)
            if name == "chunk_size" and value is None:
                values[name] = _WHOLE_PROMPT
            elif name in cls.model_fields:
                values[name] = value
            elif key in _PUBLISHED_FIXED:
                if value not in _PUBLISHED_FIXED[key]:
                    raise InvalidConfigError(f"{key}={value!r} in {str(path)!r} is not supported; leave the key out.")
            elif key not in _PUBLISHED_ENGINE_KEYS:
                raise InvalidConfigError(f"Unknown key {key!r} in {str(path)!r}; known: {sorted(cls.model_fields)}.")
        return cls(**{**values, **overrides})
