"""The configuration of `QLLMChat`: fields, their checks, and what caches and traces see of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import UnionType
from typing import Any, Self, get_args, get_type_hints

from langchain_core.language_models import LangSmithParams, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.utils import secret_from_env
from pydantic import ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from qllm_integrations.common import BLOCK_MEMORY_WINDOW, invalid_settings, warn_unknown
from qllm_integrations.langchain.state import State
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError
from qllm_runtime.types import Mode, Sampling

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
#: Keyword arguments that a single call understands.
CALL_OPTIONS = frozenset(
    (
        *_SAMPLING,
        "model",
        "logprobs",
        "top_logprobs",
        "mode",
        "reread",
        "query",
        "file_id",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "template_kwargs",
        "timeout",
        "show_progress",
        "stream",  # for langchain-core
    )
)


_OPTION_KINDS: dict[str, tuple[type | UnionType, str]] = {
    "model": (str, "text"),
    "query": (str, "text"),
    "file_id": (str, "the id of a document memory"),
    "tools": (list | tuple, "a list of tools"),
    "response_format": (Mapping, "a dictionary; schemas of other kinds go to with_structured_output()"),
    "template_kwargs": (Mapping, "a dictionary"),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Check the keyword arguments of a call that nothing else checks.

    Raises:
        InvalidConfigError: `timeout` is not a positive number.
        InvalidRequestError: An argument of the wrong type.
    """
    timeout = options.get("timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise InvalidConfigError(f"timeout={timeout!r} must be a positive number of seconds.")
    for name, (kind, takes) in _OPTION_KINDS.items():
        value = options.get(name)
        if value is not None and not isinstance(value, kind):
            raise InvalidRequestError(f"{name}= is of type {type(value).__name__}; it takes {takes}.")


@cache
def package_version() -> str:
    """Version of this distribution."""
    try:
        return version("qllm-integrations")
    except PackageNotFoundError:
        return "unknown"


class ChatSettings(BaseChatModel):
    """Fields of `QLLMChat`. Constructing loads nothing."""

    model_config = ConfigDict(populate_by_name=True)

    model: str = "reader"
    """Hub id, path, or "reader" for the small model that ships with the package."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    memory: MemoryConfig | None = None
    """Layout of the block memory (None: defaults that fit the model)."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", ..."""
    dtype: str = "auto"
    """"auto", "float32", "bfloat16" or "float16"."""
    trust_remote_code: bool = False
    """Whether a model from the hub may bring its own code."""
    hf_token: SecretStr | None = Field(alias="api_key", default_factory=secret_from_env("HF_TOKEN", default=None))
    """Token for gated models on the hub; read from HF_TOKEN if not given."""

    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    max_tokens: int = Field(default=256, ge=1)
    """Upper bound of generated tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of tokens with this probability."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep this many tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Keep tokens with at least this share of the best one's probability."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Penalty on tokens of the answer, never on the document's."""
    seed: int | None = None
    """Makes sampling reproducible."""
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    """Strings that end the answer; never part of it."""
    logprobs: bool = False
    """Report the log-probability of every token in `response_metadata["logprobs"]`."""
    top_logprobs: int | None = Field(default=None, ge=0)
    """Alternatives per token to report with them."""

    mode: Mode | None = None
    """"query_aware" reads documents for the question, "read_once" independently of it (None: the engine's default)."""
    reread: bool = True
    """Read the passages behind a draft of the answer again, next to the question, before the answer is written."""
    file_id: str | None = None
    """Id of the document memory that requests are asked of unless their messages name one; set by `with_memory`."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the model's chat template, e.g. `{"enable_thinking": False}`."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a request is given up with `TimeoutError`."""
    max_retries: int = Field(default=0, ge=0)
    """Accepted for compatibility. A local model has no transient failures; use `with_retry` for your own."""
    streaming: bool = False
    """Answer `invoke` through the streaming path, too."""
    show_progress: bool = False
    """Show a bar in tokens on stderr while documents are read."""

    shared: State = Field(default_factory=State, exclude=True, repr=False)
    """Engines and memories, shared by copies. Not a setting; a field because `configurable_fields` rebuilds from those."""

    def __init__(self, **kwargs: Any) -> None:
        try:
            super().__init__(**kwargs)
        except ValidationError as error:
            raise invalid_settings(type(self).__name__, error) from None

    @model_validator(mode="before")
    @classmethod
    def _warn_unknown(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = {name for field, info in cls.model_fields.items() for name in (field, info.alias) if name}
            warn_unknown(cls.__name__, sorted(values), known, stacklevel=4)
            required = {
                name
                for field, info in cls.model_fields.items()
                if type(None) not in get_args(info.annotation)
                for name in (field, info.alias)
            }
            values = {key: value for key, value in values.items() if value is not None or key not in required}
        return values

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: list[str] | None) -> list[str] | None:
        if value and not all(value):
            raise ValueError("an empty stop string would end every answer at once")
        return value

    @model_validator(mode="after")
    def _set_qllm_version(self) -> Self:
        if add := getattr(self, "_add_version", None):  # langchain-core 1.5 and newer
            add("qllm-integrations", package_version())
        return self

    def _resolve_model_profile(self) -> ModelProfile | None:
        constrained = importlib.util.find_spec("llguidance") is not None
        profile: dict[str, Any] = {
            "name": self.model,
            "open_weights": True,
            "max_output_tokens": self.max_tokens,
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": (pdf := importlib.util.find_spec("pypdf") is not None),
            "pdf_tool_message": pdf,
            "image_outputs": False,
            "audio_outputs": False,
            "tool_calling": True,
            "tool_choice": constrained,
            "structured_output": constrained,
            "attachment": True,
            "temperature": True,
        }
        if self.memory is None or self.memory.uses_blocks:
            profile["max_input_tokens"] = BLOCK_MEMORY_WINDOW
        known = get_type_hints(ModelProfile)
        return {key: value for key, value in profile.items() if key in known}  # type: ignore[return-value]

    @property
    def _llm_type(self) -> str:
        return "qllm-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything an answer depends on besides the messages: cache keys are made of it."""
        params: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING}
        params |= {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "memory": self.memory.model_dump() if self.memory else None,
            "stop_sequences": self.stop,  # "stop" is overwritten with the one of the call
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "mode": self.mode,
            "reread": self.reread,
            "file_id": self.file_id,
            "template_kwargs": self.template_kwargs,
            "version": package_version(),
        }
        if self.shared.token:  # an engine the caller made: its name says too little
            params["engine"] = self.shared.token
        return params

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="qllm",
            ls_model_name=kwargs.get("model") or self.model,
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens") or self.max_tokens,
        )
        if stops := self._stops(stop):
            params["ls_stop"] = list(stops)
        return params

    def _stops(self, stop: str | Sequence[str] | None) -> tuple[str, ...]:
        given = [stop] if isinstance(stop, str) else stop or ()
        if not isinstance(given, Sequence) or not all(isinstance(item, str) and item for item in given):
            raise InvalidConfigError(f"stop={stop!r} is neither a string nor a list of strings; none may be empty.")
        return tuple(dict.fromkeys([*(self.stop or ()), *given]))

    def _sampling(self, stop: list[str] | None, options: dict[str, Any]) -> Sampling:
        values = {name: getattr(self, name) if options.get(name) is None else options[name] for name in _SAMPLING}
        wanted = self.logprobs if options.get("logprobs") is None else options["logprobs"]
        top = self.top_logprobs if options.get("top_logprobs") is None else options["top_logprobs"]
        if isinstance(wanted, int) and not isinstance(
            wanted, bool
        ):  # the count of alternatives, as completions have it
            wanted, top = True, wanted
        return Sampling(**values, stop=self._stops(stop), logprobs=(top or 0) if wanted else None)
