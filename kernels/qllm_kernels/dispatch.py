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
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Literal

import torch

from qllm_kernels import (
    attention,
    choice,
    mass,
    pages,
    prefix,
    published,
    refine,
    residency,
    rotary,
    select,
    step,
    summary,
)

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


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels are launched on; a model may have its layers on several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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


def block_scores(lookup: torch.Tensor, summaries: torch.Tensor, *, scopes: int) -> torch.Tensor:
    """See :func:`qllm_kernels.select.block_scores`."""
    serve = select.block_scores
    gpu = _kernels("select", lookup.device)
    if gpu is not None and _serves("block_scores", gpu.cannot_serve(lookup, summaries)):
        serve = gpu.block_scores
    else:
        summaries = summaries.to(lookup.device)  # kernels read pinned memory of the host too
    return serve(lookup, summaries, scopes=scopes)


def choose_blocks(
    lookup: torch.Tensor,
    parts: Sequence[torch.Tensor],
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    bounds: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.choice.choose_blocks`."""
    serve = choice.choose_blocks
    gpu = _kernels("select", lookup.device)
    if gpu is not None and all(_serves("choose_blocks", gpu.cannot_serve(lookup, part)) for part in parts):
        serve = gpu.choose_blocks
    else:
        parts = [part.to(lookup.device) for part in parts]
    return serve(lookup, parts, counts, topk, scopes=scopes, question=question, weight=weight, bounds=bounds)


def append_and_choose(
    new: rotary.Arrival,
    far: torch.Tensor,
    parts: Sequence[torch.Tensor],
    counts: torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    bounds: bool = False,
    pinned: choice.Pinned | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`rotate_append` of a single token and `choose_blocks` by its far query; one launch where a kernel serves both (one part).

    Args:
        new: The token.
        far: As `rotate_append` takes it.
        parts, topk, scopes, question, weight, bounds: As `choose_blocks` takes them.
        counts: [1] integer on the device, as there.
        pinned: Keys to be hidden where the choice shows them as well, or None.

    Returns:
        The rotated queries as `rotate_append` returns them, ids and valid as `choose_blocks` does.
    """
    gpu = _kernels("append", new.query.device) if len(parts) == 1 else None
    if gpu is not None and _serves("append_and_choose", gpu.cannot_serve(new, parts)):
        chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] = gpu.append_and_choose(
            new, far, parts, counts, topk, scopes=scopes, question=question, weight=weight, bounds=bounds, pinned=pinned
        )
        return chosen
    near, far_query = rotate_append(new, far)
    assert far_query is not None
    ids, valid, _ = choose_blocks(
        far_query.transpose(0, 1), parts, counts, topk, scopes=scopes, question=question, weight=weight, bounds=bounds
    )
    if pinned is not None:
        pinned.write(ids)
    return near, far_query, ids, valid


def refine_pages(
    lookup: torch.Tensor,
    page_key: torch.Tensor,
    table: torch.Tensor,
    candidates: torch.Tensor,
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    pinned: choice.Pinned | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.refine.refine_pages`."""
    serve = refine.refine_pages
    gpu = _kernels("refine", lookup.device)
    if gpu is not None and _serves("refine_pages", gpu.cannot_serve(lookup, page_key, candidates)):
        serve = gpu.refine_pages
    return serve(
        lookup, page_key, table, candidates, counts, topk,
        scopes=scopes, question=question, weight=weight, pinned=pinned,
    )  # fmt: skip


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


def step_mass(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: attention.FarSegment | None,
    lse: torch.Tensor,
    *,
    slot: torch.Tensor,
    back: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> mass.Mass:
    """See :func:`qllm_kernels.step.step_mass`."""
    serve = step.step_mass
    gpu = _kernels("mass", near.device)
    if gpu is not None and _serves("step_mass", gpu.cannot_serve(near, window_key, far)):
        serve = gpu.step_mass
    return serve(near, window_key, far, lse, slot=slot, back=back, scale=scale, softcap=softcap)


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


def query_prefix(query: torch.Tensor) -> torch.Tensor:
    """See :func:`qllm_kernels.prefix.query_prefix`."""
    serve = prefix.query_prefix
    gpu = _kernels("prefix", query.device)
    if gpu is not None and _serves("query_prefix", gpu.cannot_serve(query)):
        serve = gpu.query_prefix
    return serve(query)


def published_means(
    key: torch.Tensor,
    key_rotated: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    *,
    n_local: int,
    repr_topk: int,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """See :func:`qllm_kernels.published.published_means`."""
    serve = published.published_means
    gpu = _kernels("published", key.device)
    if gpu is not None and _serves("published_means", gpu.cannot_serve(key, key_rotated, query)):
        serve = gpu.published_means
    return serve(key, key_rotated, query, lse, n_local=n_local, repr_topk=repr_topk, scale=scale, softcap=softcap)


def rotate_append(new: rotary.Arrival, far: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`qllm_kernels.rotary.rotate_append`."""
    serve = rotary.rotate_append
    gpu = _kernels("rotary", new.query.device)
    if gpu is not None and _serves("rotate_append", gpu.cannot_serve(new)):
        serve = gpu.rotate_append
    return serve(new, far)


def copy_pages(source: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor) -> None:
    """See :func:`qllm_kernels.pages.copy_pages`."""
    serve = pages.copy_pages
    gpu = _kernels("pages", moves.device)
    if gpu is not None and _serves("copy_pages", gpu.cannot_serve(source, target)):
        serve = gpu.copy_pages
    serve(source, target, moves, counts)


def quantise_pages(
    source: torch.Tensor, target: torch.Tensor, scales: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
) -> None:
    """See :func:`qllm_kernels.pages.quantise_pages`."""
    serve = pages.quantise_pages
    gpu = _kernels("pages", moves.device)
    if gpu is not None and _serves("quantise_pages", gpu.cannot_serve(source, target)):
        serve = gpu.quantise_pages
    serve(source, target, scales, moves, counts)


def dequantise_pages(
    source: torch.Tensor, scales: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
) -> None:
    """See :func:`qllm_kernels.pages.dequantise_pages`."""
    serve = pages.dequantise_pages
    gpu = _kernels("pages", moves.device)
    if gpu is not None and _serves("dequantise_pages", gpu.cannot_serve(source, target)):
        serve = gpu.dequantise_pages
    serve(source, scales, target, moves, counts)


def admit_pages(
    state: residency.Residency, ids: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`qllm_kernels.residency.admit_pages`."""
    serve = residency.admit_pages
    gpu = _kernels("residency", ids.device)
    if gpu is not None and _serves("admit_pages", gpu.cannot_serve(state, ids)):
        serve = gpu.admit_pages
    return serve(state, ids, valid)
