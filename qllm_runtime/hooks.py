"""What stands in for parts of a stock model while memories serve it, and is taken away again.

* A forward hook on the decoder's `rotary_emb` replaces its tables.
* Hooks on the decoder note the cache that a forward pass runs on.
* An attention function registered under our name hands queries, keys and values to that cache.
* Dropout is off, and a compiled model runs as it was written: for every new memory it would be traced anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from qllm_runtime.cache import ServingCache
from qllm_runtime.errors import InvalidRequestError, UnsupportedModelError
from qllm_runtime.memory.base import Scoring
from qllm_runtime.rotary import unchanged
from qllm_runtime.waiting import after_fork

ATTENTION = "qllm_memory"


class _Current(threading.local):
    """The cache of the forward pass under way in this thread."""

    cache: ServingCache | None = None


_current = _Current()


def _current_cache() -> ServingCache:
    if _current.cache is None:
        raise InvalidRequestError(
            "The model was called while it answers a request, which serves its attention from a memory: call it yourself when "
            "no request is under way, or load a copy of your own."
        )
    return _current.cache


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    cache = _current_cache()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, softcap, s_aux)
    return cache.attend(module, query, key, value, scoring, sliding_window).contiguous(), None


def stand_in_mask(device: torch.device) -> torch.Tensor:
    """Dummy mask that keeps transformers from building one. Memories ignore masks."""
    return torch.zeros(1, 1, 1, 1, device=device)


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """The attention of the model and of its parts (text, vision), as `set_attn_implementation` takes it."""
    parts = {name: getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {})}
    found = {"": model.config, **{name: part for name, part in parts.items() if part is not None}}
    return {name: part._attn_implementation for name, part in found.items()}


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that turns tokens into hidden states."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # a head may go by the name of decoder
        decoder = model.base_model
    return getattr(model, "model", model) if decoder is model else decoder


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings those that it offloaded.

    Raises:
        UnsupportedModelError: Its weights are on the meta device, and nothing brings them.
    """
    first = next(chain(module.parameters(), module.buffers()))
    if not first.is_meta:
        return first.device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # several in a row
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise UnsupportedModelError(
        f"{type(module).__name__} has weights on the meta device, which holds no numbers, and no hook of accelerate brings "
        "them; load the weights with from_pretrained, with a device_map if they do not fit on one device."
    )


def _enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, ServingCache))
    _current.cache = next(given, None)


def _leave(module: torch.nn.Module, args: Any, output: Any) -> None:
    _current.cache = None


class _Eager:
    """Compiled functions run as they were written, in the whole process: torch knows no smaller scope."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stance = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._users += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stance.close()

    def leave(self) -> None:
        """Leave for all who are in it."""
        self._stance.close()


_eager = _Eager()


def _after_fork() -> None:
    """Threads that wanted it do not live on in a forked process."""
    global _eager
    _eager.leave()
    _eager = _Eager()


after_fork(_after_fork)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode and, where it was compiled, eagerly; afterwards it is as before."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        with _eager if any(map(_is_compiled, modules)) else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether it was compiled, by `module.compile()` or by way of its `forward`."""
    by_call = getattr(module, "_compiled_call_impl", None) is not None
    return by_call or hasattr(module.forward, "_torchdynamo_orig_callable")


@contextmanager
def hooked(model: PreTrainedModel, rotary: torch.nn.Module | None, tables: Callable[..., Any]) -> Iterator[None]:
    """Have the cache that `model` is called with compute its attention.

    Args:
        model: The model.
        rotary: Its rotary embedding, if it has one.
        tables: Forward hook (with keyword arguments) on that.

    Raises:
        UnsupportedModelError: The model's attention cannot be replaced.
    """
    previous = _implementations(model)
    decoder = decoder_of(model)
    with ExitStack() as stack:
        if rotary is not None:
            stack.enter_context(unchanged(rotary))

            def served(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                _current_cache()
                return tables(module, args, kwargs, output)

            stack.callback(rotary.register_forward_hook(served, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_pre_hook(_enter, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(_leave, always_call=True).remove)
        stack.callback(model.set_attn_implementation, previous)
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not route its attention through transformers' AttentionInterface."
            )
        yield


def identity(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Tables that rotate nothing."""
    if isinstance(output, torch.Tensor):  # complex numbers
        return torch.ones_like(output)
    return torch.ones_like(output[0]), torch.zeros_like(output[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many ways in which host and device say that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
