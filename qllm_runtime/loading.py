"""Finding and loading models; weights are shared within the process."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qllm_runtime.errors import InvalidConfigError, ModelNotFoundError, OutOfMemoryError, UnsupportedModelError
from qllm_runtime.inference import Inference
from qllm_runtime.seam import is_out_of_memory

_BUILTIN = Path(__file__).parent / "models"
BUILTIN_MODELS = ("reader", "reader-plain")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class LoadedModel:
    """A model with its tokenizer; `inference` serialises the requests of everyone who shares it."""

    name: str
    tokenizer: Any
    inference: Inference = field(repr=False)


_shared: weakref.WeakValueDictionary[tuple[Any, ...], LoadedModel] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def locate(model: str | os.PathLike[str]) -> str:
    """Path or hub id behind a model name."""
    if str(model) in BUILTIN_MODELS:
        return str(_BUILTIN / str(model))
    return os.fspath(model)


def load(
    model: str | os.PathLike[str] = "reader",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    token: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model, or return the one that is loaded already under the same (model, revision, dtype, device).

    Args:
        model: "reader", "reader-plain", a local path or a Hugging Face hub id.
        revision: Revision on the hub.
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "float16" or "bfloat16".
        token: Hub token.
        trust_remote_code: Passed on to transformers.

    Raises:
        ModelNotFoundError: Nothing could be loaded under this name.
        UnsupportedModelError: transformers does not know the architecture, or it has no causal language model.
        InvalidConfigError: Unknown device or dtype.
        OutOfMemoryError: The weights do not fit.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    key = (locate(model), revision, kind, str(place))
    with _loading:
        loaded = _shared.get(key)
        if loaded is None:
            network, tokenizer = _load(locate(model), revision, place, kind, token, trust_remote_code)
            loaded = LoadedModel(str(model), tokenizer, Inference.of(network))
            _shared[key] = loaded
        return loaded


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidConfigError(f"Unknown device {device!r}; use 'auto', 'cpu', 'cuda' or 'cuda:N'.") from error
    if place.type == "meta":
        raise InvalidConfigError("device='meta' holds no numbers to compute with; use 'auto', 'cpu' or 'cuda'.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidConfigError(f"device={device!r}, but this machine has no usable CUDA device; use 'auto' or 'cpu'.")
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise InvalidConfigError(f"Unknown dtype {dtype!r}; use 'auto' or one of {sorted(_DTYPES)}.")
    return _DTYPES[dtype]


def _load(
    where: str, revision: str | None, place: torch.device, dtype: torch.dtype | str, token: str | None, trust: bool
) -> tuple[PreTrainedModel, Any]:
    common: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust}
    common = {k: v for k, v in common.items() if v}
    hint = "Give a local folder, a Hugging Face hub id that this machine can reach, or 'reader'."
    try:
        config = AutoConfig.from_pretrained(where, **common)
    except (OSError, ValueError) as error:
        known = "model type" not in str(error)
        if known or not Path(where).exists():
            raise ModelNotFoundError(f"No model {where!r}: {_first_line(error)} {hint}") from error
        raise UnsupportedModelError(
            f"transformers does not know the architecture of {where!r}: {_first_line(error)}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        network = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype, **common)
        network = network.to(place).eval()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"The weights of {where!r} do not fit on {place}: {_first_line(error)}") from error
        raise ModelNotFoundError(f"Cannot load {where!r}: {_first_line(error)}") from error
    except (OSError, ImportError, SafetensorError) as error:
        raise ModelNotFoundError(f"Cannot load {where!r}: {_first_line(error)} {hint}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"{where!r} is no causal language model: {_first_line(error)}") from error
    return network, tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
