"""The operations, each served by its torch function or by the Triton kernel beside it.

Tensors on CUDA devices go to Triton, all others to torch. The environment variable `QLLM_KERNELS` (torch or triton) decides
otherwise; it is read once per device. What a kernel cannot serve goes to torch, with one warning that says why. Triton is
imported when the first call needs it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch

from qllm_kernels import attention, eligible, mass, select, step, summary

VARIABLE = "QLLM_KERNELS"
_OLDEST_GPU = (8, 0)


@functools.cache
def backend(device: torch.device) -> Literal["torch", "triton"]:
    """The implementation for tensors on `device`, before looking at shapes.

    Raises:
        ValueError: `QLLM_KERNELS` is neither torch nor triton.
    """
    wanted = os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" else "torch")
    if wanted not in ("torch", "triton"):
        raise ValueError(f"{VARIABLE}={wanted!r} is unknown; use 'torch', 'triton' or leave it unset.")
    if wanted == "torch":
        return "torch"
    reason = _unavailable(device)
    if reason is None:
        return "triton"
    warn_once(f"The torch functions serve {device}: {reason}.")
    return "torch"


def _unavailable(device: torch.device) -> str | None:
    try:
        knobs = importlib.import_module("triton.knobs")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'qllm-integrations[gpu]'"
    if device.type != "cuda":
        return None if knobs.runtime.interpret else "triton needs a CUDA device or TRITON_INTERPRET=1"
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST_GPU:
        return f"compute capability {found[0]}.{found[1]} is below {_OLDEST_GPU[0]}.{_OLDEST_GPU[1]}"
    return None


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time this message comes up."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _kernels(name: str, device: torch.device) -> ModuleType | None:
    """The module `qllm_kernels.gpu.<name>` if Triton serves `device`."""
    return importlib.import_module(f"qllm_kernels.gpu.{name}") if backend(device) == "triton" else None


def _serves(operation: str, reason: str | None) -> bool:
    """Whether a kernel that refuses for this reason (None: does not) is used; says so once when it is not."""
    if reason is not None:
        warn_once(f"The torch function serves {operation}: {reason}.")
    return reason is None


def top_blocks(
    lookup: torch.Tensor, summaries: torch.Tensor, counts: Sequence[int] | torch.Tensor, topk: int, *, scopes: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.select.top_blocks`; of counts on the device :func:`qllm_kernels.eligible.top_blocks`."""
    gpu = _kernels("select", lookup.device)
    if gpu is not None and _serves("top_blocks", gpu.cannot_serve(lookup, summaries, topk)):
        chosen: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] = gpu.top_blocks(
            lookup, summaries, counts, topk, scopes=scopes
        )
        return chosen
    if isinstance(counts, torch.Tensor):
        return eligible.top_blocks(lookup, summaries, counts, topk, scopes=scopes)
    return select.top_blocks(lookup, summaries, counts, topk, scopes=scopes)


def attend_pieces(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: attention.FarSegment | None,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`qllm_kernels.attention.attend_pieces`."""
    serve = attention.attend_pieces
    gpu = _kernels("attention", near.device)
    if gpu is not None and _serves("attend_pieces", gpu.cannot_serve(near, window_key, window_value, far)):
        serve = gpu.attend_pieces
    return serve(near, window_key, window_value, far, slot=slot, back=back, length=length, scale=scale, softcap=softcap)


def attend_step(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: attention.FarSegment | None,
    *,
    slot: torch.Tensor,
    back: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`qllm_kernels.step.attend_step`."""
    serve = step.attend_step
    gpu = _kernels("attention", near.device)
    if gpu is not None and _serves("attend_step", gpu.cannot_serve(near, window_key, window_value, far)):
        serve = gpu.attend_step
    return serve(near, window_key, window_value, far, slot=slot, back=back, scale=scale, softcap=softcap)


def attention_mass(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: attention.FarSegment | None,
    lse: torch.Tensor,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None = None,
    window: bool = True,
) -> mass.Mass:
    """See :func:`qllm_kernels.mass.attention_mass`."""
    serve = mass.attention_mass
    gpu = _kernels("mass", near.device)
    if gpu is not None and _serves("attention_mass", gpu.cannot_serve(near, window_key, far)):
        serve = gpu.attention_mass
    return serve(
        near, window_key, far, lse,
        slot=slot, back=back, length=length, scale=scale, softcap=softcap, window=window,
    )  # fmt: skip


def mean_keys(key: torch.Tensor) -> torch.Tensor:
    """See :func:`qllm_kernels.summary.mean_keys`."""
    serve = summary.mean_keys
    gpu = _kernels("summary", key.device)
    if gpu is not None and _serves("mean_keys", gpu.cannot_serve(key)):
        serve = gpu.mean_keys
    return serve(key)


def linear_top_keys(
    key: torch.Tensor, key_rotated: torch.Tensor, query_prefix: torch.Tensor, n_local: int, repr_topk: int
) -> torch.Tensor:
    """See :func:`qllm_kernels.summary.linear_top_keys`."""
    serve = summary.linear_top_keys
    gpu = _kernels("summary", key.device)
    if gpu is not None and _serves("linear_top_keys", gpu.cannot_serve(key)):
        serve = gpu.linear_top_keys
    return serve(key, key_rotated, query_prefix, n_local, repr_topk)
