"""The arguments that every kernel over window and far keys takes."""

from __future__ import annotations

import math
from typing import Any

import torch

from qllm_kernels.attention import FarSegment
from qllm_kernels.gpu.shapes import MOST_PIECES, refusal

LARGEST_GROUP = 16
_LOG2E = math.log2(math.e)


def cannot_serve(near: torch.Tensor, window_key: torch.Tensor, *others: torch.Tensor | FarSegment | None) -> str | None:
    """Why no kernel attends with these arguments, or None."""
    group = near.shape[0] // window_key.shape[0]
    if group > LARGEST_GROUP:
        return f"{group} heads share a key/value head, more than {LARGEST_GROUP}"
    given: list[torch.Tensor | None] = [near, window_key]
    for other in others:
        if isinstance(other, FarSegment):
            if other.pieces > MOST_PIECES:
                return f"{other.pieces} pieces are more than {MOST_PIECES}"
            given += [other.query, other.key, other.value, other.page_key, other.page_value]
        else:
            given.append(other)
    return refusal(*given)


def logit_factors(scale: float, softcap: float | None) -> dict[str, Any]:
    """Factor on dot products and cap that give logits in base 2 (with a cap: the argument of its tanh, doubled)."""
    if softcap is None:
        return {"factor": scale * _LOG2E, "cap": 0.0, "SOFTCAP": False}
    return {"factor": 2 * scale * _LOG2E / softcap, "cap": softcap * _LOG2E, "SOFTCAP": True}


def far_arguments(far: FarSegment | None, absent: torch.Tensor, *, values: bool) -> dict[str, Any]:
    """Tensors, strides, sizes and flags of the far keys (and values).

    Args:
        far: The far keys, or None.
        absent: Stands for tensors that are not there and never read.
        values: Whether the kernel reads values, too.
    """
    given: dict[str, Any] = {} if far is None else {name: x for name, x in vars(far).items() if x is not None}
    kinds = ("key", "value") if values else ("key",)
    arguments: dict[str, Any] = {}
    for kind in kinds:
        loose, pages = given.get(kind, absent), given.get(f"page_{kind}", absent)
        arguments[f"loose_{kind}"], arguments[f"page_{kind}"] = loose, pages
        for axis, name in enumerate(("head", "piece", "row")):
            arguments[f"stride_loose_{kind}_{name}"] = loose.stride(axis) if loose.ndim == 4 else 0
        for axis, name in enumerate(("head", "page")):
            arguments[f"stride_page_{kind}_{name}"] = pages.stride(axis) if pages.ndim == 4 else 0
    hidden, table = given.get("hidden"), given.get("table")
    k = 0 if table is None else table.shape[2]
    n_loose = given["key"].shape[2] if "key" in given else 0
    scoped = table if table is not None else hidden
    return arguments | {
        "hidden": absent if hidden is None else hidden.contiguous().view(torch.uint8),
        "table": absent if table is None else table.contiguous(),
        "n_chosen": given.get("n_chosen", absent),
        "n_loose": n_loose,
        "k": k,
        "PAGE": given["page_key"].shape[2] if k else 1,
        "SCOPES": 1 if scoped is None else scoped.shape[1],
        "LOOSE": n_loose > 0,
        "HIDDEN": hidden is not None,
        "PAGES": k > 0,
        "COUNTED": "n_chosen" in given,
    }
