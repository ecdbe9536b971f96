"""Kernels compiled for GPUs that are not there, within the registers and the shared memory of `budgets.json`.

A kernel of the table is given for bf16 in the shape of Llama-3-8B (32/8 heads of 128) where it says nothing else. Nothing may
spill. `python tests/kernels/test_compiled.py` prints the table anew, for all kernels and architectures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from compiling import Usage, compile_kernel

pytest.importorskip("triton")
BUDGETS: dict[str, dict[str, list[int]]] = json.loads(Path(__file__).with_name("budgets.json").read_text())
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # most a program may have


def _types(*, pointers: str, whole: str = "", strides: str = "", floats: str = "", **others: str) -> dict[str, str]:
    types = dict.fromkeys(pointers.split(), "*bf16/16") | dict.fromkeys(whole.split(), "i32")
    types |= dict.fromkeys(strides.split(), "i32/16") | dict.fromkeys(floats.split(), "fp32")
    return types | others


def _select(pieces: int) -> tuple[dict[str, str], dict[str, Any]]:
    from qllm_kernels.gpu import select

    types = _types(
        pointers="lookup summaries", whole="pieces n_blocks tiles_per_split", n_eligible="*i32/16", scores="*fp32/16",
        candidates="*i64/16", strides="stride_lookup_piece stride_lookup_head stride_summary_block stride_summary_r",
        stride_summary_head="i64/16",
    )  # fmt: skip
    return types, {"HEADS": 8, "GROUP": 4, "R": 4, "D": 128, **select.constants(pieces, 4, 128, 16, 2)}


def _attention(rows: int, arch: int, dim: int = 128, splits: int = 1) -> tuple[dict[str, str], dict[str, Any]]:
    from qllm_kernels.gpu import attention

    kinds = (
        "near_head",
        "near_row",
        "far_head",
        "far_row",
        *(f"window_{x}_{y}" for x in ("key", "value") for y in ("head", "row")),
    )
    kinds += tuple(f"loose_{x}_{y}" for x in ("key", "value") for y in ("head", "piece", "row"))
    kinds += tuple(f"page_{x}_page" for x in ("key", "value"))
    types = _types(
        pointers="near far window_key window_value loose_key loose_value page_key page_value",
        whole="slot back length n_loose k", strides=" ".join(f"stride_{x}" for x in kinds), floats="factor cap",
        out="*fp32/16" if splits > 1 else "*bf16/16", lse="*fp32/16", hidden="*u8/16", table="*i64/16", n_chosen="*i32/16",
        stride_page_key_head="i64/16", stride_page_value_head="i64/16",
    )  # fmt: skip
    flags = {"LOOSE": True, "HIDDEN": True, "PAGES": True, "SOFTCAP": False, "SPLITS": splits}
    sizes = attention.constants(rows, dim, dim, 2, wgmma=arch >= 90)
    return types, {"GROUP": 4, "D": dim, "DV": dim, "PAGE": 64, "SCOPES": 1, **flags, **sizes}


def compiled(name: str, arch: int) -> Usage:
    from qllm_kernels.gpu import attention, select, summary

    match name:
        case "score_blocks prefill":
            return compile_kernel(select.score_blocks, *_select(32), arch)
        case "score_blocks decode":
            return compile_kernel(select.score_blocks, *_select(1), arch)
        case "merge_candidates":
            types = _types(
                pointers="", whole="n_candidates n_blocks k", candidates="*i64/16", ids="*i64/16", valid="*i1/16"
            )
            return compile_kernel(select.merge_candidates, types, {"BC": 512, "BK": 16, "num_warps": 4}, arch)
        case "segment_attention prefill":
            return compile_kernel(attention.segment_attention, *_attention(1024, arch), arch)
        case "segment_attention prefill 256":
            return compile_kernel(attention.segment_attention, *_attention(1024, arch, 256), arch)
        case "segment_attention decode":
            return compile_kernel(attention.segment_attention, *_attention(4, arch, splits=32), arch)
        case "average_keys":
            strides = "stride_head stride_block stride_row"
            constants = {"SIZE": 64, "D": 128, "BB": 64, "BD": 32, "num_warps": 4}
            return compile_kernel(summary.average_keys, _types(pointers="key out", strides=strides), constants, arch)
        case "best_keys":
            strides = "stride_head stride_block stride_row stride_rotated_head stride_rotated_row"
            strides += " stride_prefix_head stride_prefix_row"
            types = _types(pointers="key rotated out", whole="n_local", strides=strides, prefix="*fp32/16")
            constants = {"SIZE": 64, "R": 4, "D": 128, "BB": 64, "BR": 4, "BD": 32, "num_warps": 4}
            return compile_kernel(summary.best_keys, types, constants, arch)
        case "merge_splits":
            types = _types(pointers="out", whole="rows", parts="*fp32/16", part_lse="*fp32/16", lse="*fp32/16")
            constants = {"SPLITS": 32, "DV": 128, "BS": 32, "BV": 128, "num_warps": 4}
            return compile_kernel(attention.merge_splits, types, constants, arch)
    raise ValueError(name)


@pytest.mark.parametrize(("name", "arch"), [(name, int(arch)) for name, archs in BUDGETS.items() for arch in archs])
def test_budget(name: str, arch: int) -> None:
    registers, shared = BUDGETS[name][str(arch)]
    usage = compiled(name, arch)
    assert usage.spilled == 0
    assert usage.registers <= registers <= 255
    assert usage.shared <= shared <= SHARED[arch]
    if "prefill" in name and arch == 90:
        assert usage.wgmma > 0
    elif "attention" in name or "score" in name:
        assert usage.wgmma + usage.mma > 0


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for name, archs in BUDGETS.items():
        for arch in archs:
            if not wanted or name in wanted:
                print(f"{name} sm_{arch}: {compiled(name, int(arch))}", flush=True)
