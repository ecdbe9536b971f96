"""Finding and loading models; weights are shared within the process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from qllm_runtime.errors import InvalidConfigError, ModelNotFoundError, OutOfMemoryError, UnsupportedModelError
from qllm_runtime.hooks import is_out_of_memory
from qllm_runtime.inference import Inference
from qllm_runtime.inventory import BUILTIN, MODELS
from qllm_runtime.waiting import after_fork

_HINT = "Give a local folder, a Hugging Face hub id that this machine can reach, or 'reader'."
_AGAIN = "Download or save the model again."
_NAMED = 3  # weights that an error names
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class LoadedModel:
    """A model with its tokenizer; `inference` serialises the requests of everyone who shares it."""

    name: str
    tokenizer: Any
    inference: Inference = field(repr=False)


# by (place of the files, revision, dtype, device); a model stands under the dtype asked for and under the one it has
_shared: weakref.WeakValueDictionary[tuple[Any, ...], LoadedModel] = weakref.WeakValueDictionary()
# one for all models: transformers changes torch's default dtype while it builds one
_loading = threading.Lock()


def _after_fork() -> None:
    """Let the new process load what it cannot use its copy of."""
    global _loading
    _loading = threading.Lock()
    for key, loaded in list(_shared.items()):
        if loaded.inference.forked_mid_request:
            del _shared[key]


after_fork(_after_fork)  # after that of `Inference`, which finds out


def locate(model: str | os.PathLike[str]) -> str:
    """Path (`~` expanded) or hub id behind a model name."""
    if str(model) in BUILTIN:
        return str(MODELS / str(model))
    return os.path.expanduser(os.fspath(model))


def load(
    model: str | os.PathLike[str] = "reader",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    token: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model, or return the one that is loaded already with the same (model, revision, dtype, device).

    A model that is loaded already is returned at once, whatever else is being loaded or downloaded.

    Args:
        model: "reader", "reader-plain", a local path or a Hugging Face hub id.
        revision: Revision on the hub.
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "float16" or "bfloat16".
        token: Hub token.
        trust_remote_code: Passed on to transformers.

    Raises:
        ModelNotFoundError: Nothing could be loaded under this name, or weights or the tokenizer are missing or damaged.
        UnsupportedModelError: transformers does not know the architecture, or it has no causal language model.
        InvalidConfigError: Unknown device or dtype.
        OutOfMemoryError: The weights do not fit.
    """
    place, where = _device(device), locate(model)
    kind = _dtype(dtype, place)

    def key(kind: torch.dtype | str) -> tuple[Any, ...]:
        return str(Path(where).resolve()) if Path(where).is_dir() else where, revision, kind, str(place)

    loaded = _shared.get(key(kind))
    if loaded is not None:
        return loaded
    with _loading:
        loaded = _shared.get(key(kind))  # another thread may have loaded it meanwhile
        if loaded is None:
            common = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
            common = {name: value for name, value in common.items() if value}
            config = _config(where, common)
            own = config.dtype if kind == "auto" and isinstance(config.dtype, torch.dtype) else kind
            loaded = _shared.get(key(own))
            if loaded is None:
                network, tokenizer = _load(where, config, place, kind, common)
                loaded = LoadedModel(str(model), tokenizer, Inference.of(network))
            _shared[key(kind)] = _shared[key(own)] = loaded
        return loaded


def _device(device: str) -> torch.device:
    """The device, with its number where there can be several."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidConfigError(f"Unknown device {device!r}; use 'auto', 'cpu', 'cuda' or 'cuda:N'.") from error
    if place.type == "meta":
        raise InvalidConfigError("device='meta' holds no numbers to compute with; use 'auto', 'cpu' or 'cuda'.")
    if place.type != "cuda":
        return place
    count = torch.cuda.device_count()
    if count == 0:
        raise InvalidConfigError(f"device={device!r}, but this machine has no usable CUDA device; use 'auto' or 'cpu'.")
    if (place.index or 0) >= count:
        raise InvalidConfigError(
            f"device={device!r}, but this machine has {count} usable CUDA device{'s' * (count > 1)}, counted from 0; use "
            "'auto' or another number."
        )
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def _dtype(dtype: str, place: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise InvalidConfigError(f"Unknown dtype {dtype!r}; use 'auto' or one of {sorted(_DTYPES)}.")
    return _DTYPES[dtype]


def _load(
    where: str, config: PreTrainedConfig, place: torch.device, dtype: torch.dtype | str, common: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    tokenizer = _tokenizer(where, common)
    return _network(where, config, place, dtype, common), tokenizer


def _config(where: str, common: dict[str, Any]) -> PreTrainedConfig:
    is_path = where.startswith((".", "/", "~")) or where.endswith("/")
    if is_path and not Path(where).is_dir():
        raise ModelNotFoundError(f"There is no folder {where!r}. {_HINT}")
    try:
        config = AutoConfig.from_pretrained(where, **common)
    except (OSError, ValueError) as error:
        known = "model type" not in str(error)
        if known or not Path(where).exists():
            raise ModelNotFoundError(f"No model {where!r}: {_reason(error)}. {_HINT}") from error
        raise UnsupportedModelError(
            f"transformers does not know the architecture of {where!r}: {_reason(error)}."
        ) from error
    except Exception as error:  # what a damaged file makes the code of each architecture raise
        raise ModelNotFoundError(f"Cannot load the configuration of {where!r}: {_reason(error)}. {_AGAIN}") from error
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ())
    if auto_class(config) is None and not remote:
        raise UnsupportedModelError(
            f"{where!r} is not a causal language model of transformers: its model type is {config.model_type!r}."
        )
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """What makes models of a configuration that write text, those that also see images among them; None: there are none."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


def _tokenizer(where: str, common: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(where, **common)
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelNotFoundError(
            f"Cannot load the tokenizer of {where!r}: {_reason(error)}. Put its files (tokenizer.json, "
            "tokenizer_config.json) next to the weights, or download or save the model again."
        ) from error


def _network(
    where: str, config: PreTrainedConfig, place: torch.device, dtype: torch.dtype | str, common: dict[str, Any]
) -> PreTrainedModel:
    try:
        with _no_bar_of_weights():
            network, info = (auto_class(config) or AutoModelForCausalLM).from_pretrained(
                where, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **common
            )
        network = network.to(place).eval()
    except (OSError, ImportError, SafetensorError) as error:
        raise ModelNotFoundError(f"Cannot load {where!r}: {_reason(error)}. {_HINT}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"The weights of {where!r} do not fit on {place}: {_reason(error)}.") from error
        raise ModelNotFoundError(f"Cannot load {where!r}: {_reason(error)}. {_AGAIN}") from error
    _check_complete(where, network, info)
    return network


@contextmanager
def _no_bar_of_weights() -> Iterator[None]:
    """Keep the bar away that transformers draws for weights read from a disk; bars of downloads stay."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == "Loading weights":
            kwargs = {**kwargs, "disable": True}
        return before(factory, args, kwargs) if before else factory(*args, **kwargs)

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _check_complete(where: str, network: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that the checkpoint does not hold; transformers makes them up at random.

    It does not count tied weights as missing; buffers are computed where a checkpoint leaves them out.
    """
    learned = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    missing = sorted(learned.intersection(info["missing_keys"]))
    if missing:
        raise ModelNotFoundError(
            f"The checkpoint {where!r} is incomplete, {len(missing)} of its weights are missing: {_some(missing)}. {_AGAIN}"
        )
    mismatched = [
        f"{name} {list(has)} instead of {list(needs)}" for name, has, needs in sorted(info["mismatched_keys"])
    ]
    if mismatched:
        raise ModelNotFoundError(
            f"{len(mismatched)} weights of {where!r} have other shapes than config.json says: {_some(mismatched)}. {_AGAIN}"
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:_NAMED]) + (", ..." if len(items) > _NAMED else "")


def _reason(error: BaseException) -> str:
    """What an error says first, and what kind of error it is where it says too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(" .,:")
    bare = isinstance(error, LookupError | ArithmeticError | AttributeError | TypeError)
    return f"{type(error).__name__}: {text}" if bare or not text else text
