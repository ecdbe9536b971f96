"""What the kernels are compiled for: every value of every axis, in as few cases as a greedy search finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compiling import Compilation

ARCHS = (80, 86, 89, 90, 100, 120)
SHARED = dict.fromkeys((86, 89, 120), 99 * 1024) | {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Case:
    """One compilation: the kernel's name in `KERNELS` and the values of the axes it depends on."""

    name: str
    arch: int = 90
    dtype: str = "bf16"
    dim: int = 128
    group: int = 4
    block: int = 64
    softcap: bool = False

    @property
    def label(self) -> str:
        kept = [
            f"sm_{self.arch}",
            *(str(getattr(self, axis)) for axis in AXES[self.name] if axis not in ("arch", "softcap")),
        ]
        return " ".join([*kept, *(["softcap"] if self.softcap else [])])

    @property
    def size(self) -> int:
        return TYPES[self.dtype]

    @property
    def target(self) -> Any:
        from qllm_kernels.gpu.shapes import Target

        return Target(self.arch in (90, 100), SHARED[self.arch])

    def pointers(self, same: str, **others: str) -> dict[str, str]:
        return dict.fromkeys(same.split(), f"*{self.dtype}") | {name: f"*{kind}" for name, kind in others.items()}


_VALUES: dict[str, tuple[Any, ...]] = {
    "arch": ARCHS,
    "dtype": tuple(TYPES),
    "dim": (32, 64, 96, 128, 256),
    "group": (1, 4, 7, 16),
    "block": (16, 64, 256),
    "softcap": (False, True),
}
PINNED_TYPES = {"pinned_block": "*i64", "pinned_position": "*i64", "border": "*i64", "hidden": "*i1"}
_KEYS = "window_key loose_key page_key"


def _attention(case: Case, rows: int, splits: int) -> Compilation:
    from qllm_kernels.gpu import attention

    on_device = splits > 1
    place = {"slot": "i64", "back": "i64"} if on_device else {}
    pointers = case.pointers(
        f"near far {_KEYS} window_value loose_value page_value out", lse="fp32", parts="fp32", part_lse="fp32", done="i32",
        hidden="u8", table="i64", n_chosen="i32", **place,
    )  # fmt: skip
    flags = {
        "LOOSE": True,
        "HIDDEN": True,
        "PAGES": True,
        "COUNTED": True,
        "SOFTCAP": case.softcap,
        "ON_DEVICE": on_device,
        "WIDE": False,
    }
    sizes = attention.constants(rows * case.group, case.dim, case.dim, case.size, case.target)
    sizes |= attention.merging(rows * case.group if splits > 1 else 1, case.dim, splits)
    shape = {"GROUP": case.group, "D": case.dim, "DV": case.dim, "PAGE": case.block, "SCOPES": 1, "SPLITS": splits}
    wide = ("stride_page_key_head", "stride_page_value_head")
    return Compilation(attention.segment_attention, pointers, {**flags, **shape, **sizes}, ("factor", "cap"), wide)


def _mass(case: Case, rows: int) -> Compilation:
    from qllm_kernels.gpu import mass

    on_device = {"slot": "i64", "back": "i64"} if rows == 1 else {}
    pointers = case.pointers(
        f"near far {_KEYS}", lse="fp32", mass="fp32", hidden="u8", table="i64", n_chosen="i32", **on_device
    )
    flags = {"LOOSE": True, "HIDDEN": True, "PAGES": True, "COUNTED": True, "SOFTCAP": case.softcap}
    flags["ON_DEVICE"] = rows == 1
    sizes = mass.constants(rows * case.group, case.dim, case.size)
    shape = {"GROUP": case.group, "D": case.dim, "PAGE": case.block, "SCOPES": 1}
    return Compilation(
        mass.segment_mass, pointers, {**flags, **shape, **sizes}, ("factor", "cap"), ("stride_page_key_head",)
    )


def _select(
    case: Case,
    pieces: int,
    *,
    every_key: bool = False,
    guided: bool = False,
    bounds: bool = False,
    appends: bool = False,
) -> Compilation:
    from qllm_kernels.gpu import append, choose, select

    chooses = pieces == 1
    written = {"ids": "i64", "valid": "i1"} if chooses else {"ids": "fp32", "valid": "fp32"}
    pointers = case.pointers(
        "summaries",
        n_eligible="i64" if chooses else "i32",
        scores="fp32",
        moments="fp32",
        question="fp32",
        done="i32",
        **written,
    )
    sizes = select.constants(
        pieces, case.group, case.dim, case.size, case.target, bounds=bounds, side_by_side=every_key
    )
    assert sizes is not None
    r = case.block if every_key else 1 if bounds else 4
    shape = {"HEADS": 8, "GROUP": case.group, "R": r, "D": case.dim, "BOUNDS": bounds}
    flags = {"COUNTED": True, "GUIDED": guided, "CHOOSES": chooses, "BS": 256 if chooses and guided else 1}
    sizes |= {**shape, **flags, "BC": choose.TILE if chooses else 1}
    floats, wide = ("weight",), ("stride_summary_head",)
    if not appends:
        pointers |= {"lookup": f"*{case.dtype}" if pieces > 1 else "*fp32"}
        return Compilation(select.score_blocks, pointers, sizes, floats, wide)
    given = _arrival(case, interleaved=False)
    pointers |= {"lookup": f"*{case.dtype}"}
    sizes |= given.constants | {"KV_HEADS": 8, "BH": 16, "BW": given.constants["BD"], "BD": sizes["BD"]}
    sizes |= {"PINNED": guided, **choose.PINNED_TILE, **append.OPTIONS}
    pointers |= PINNED_TYPES
    for name in ("FAR", "BT"):
        del sizes[name]
    return Compilation(append.append_and_score, pointers | given.pointers, sizes, floats, wide)


def _choose(case: Case, guided: bool) -> Compilation:
    from qllm_kernels.gpu import choose

    pointers = case.pointers(
        "", scores="fp32", moments="fp32", question="fp32", n_eligible="i32", ids="i64", valid="i1"
    )
    sizes = {"GUIDED": guided, "BS": 256 if guided else 1, "BN": choose.TILE, "num_warps": 8}
    return Compilation(choose.choose, pointers, sizes, ("weight",))


def _refine(case: Case) -> Compilation:
    from qllm_kernels.gpu import choose, refine

    numbers = {"table": "i64", "candidates": "i64", "counts": "i64", "done": "i32", "ids": "i64", "valid": "i1"}
    pointers = case.pointers("key lookup", scores="fp32", moments="fp32", question="fp32", **numbers)
    sizes = refine.constants(case.group, case.dim, case.block, case.size, 128, case.target)
    shape = {"HEADS": 8, "GROUP": case.group, "SIZE": case.block, "D": case.dim, "GUIDED": True, "PINNED": True}
    sizes |= choose.PINNED_TILE
    return Compilation(
        refine.refine, pointers | PINNED_TYPES, {**shape, **sizes}, ("weight",), ("stride_key_head", "stride_key_page")
    )


def _average_keys(case: Case) -> Compilation:
    from qllm_kernels.gpu import summary

    constants = {"SIZE": case.block, "D": case.dim, "BB": case.block, "BD": 32, "num_warps": 4}
    return Compilation(summary.average_keys, case.pointers("key out"), constants)


def _best_keys(case: Case) -> Compilation:
    from qllm_kernels.gpu import summary

    constants = {"SIZE": case.block, "R": 4, "D": case.dim, "BB": case.block, "BR": 4, "BD": 32, "num_warps": 4}
    return Compilation(summary.best_keys, case.pointers("key rotated out", prefix="fp32"), constants)


def _token_mass(case: Case) -> Compilation:
    from qllm_kernels.gpu import published

    sizes = published.constants(case.dim, case.size)
    constants = {"GROUP": case.group, "D": case.dim, "SOFTCAP": case.softcap, **sizes}
    return Compilation(
        published.token_mass, case.pointers("query rotated", lse="fp32", mass="fp32"), constants, ("factor", "cap")
    )


def _mean_of_best(case: Case) -> Compilation:
    from qllm_kernels.gpu import published

    constants = {
        "GROUP": 4,
        "SIZE": case.block,
        "R": 4,
        "D": case.dim,
        "BB": case.block,
        "BR": 4,
        "BD": 32,
        "num_warps": 4,
    }
    return Compilation(published.mean_of_best, case.pointers("key out", mass="fp32"), constants)


def _prefix(case: Case, kernel: str) -> Compilation:
    from qllm_kernels.gpu import prefix

    constants = {"D": case.dim, "BT": 64, "BD": 64, "num_warps": 4}
    return Compilation(getattr(prefix, kernel), case.pointers("query", sums="fp32", prefix="fp32"), constants)


def _arrival(case: Case, interleaved: bool) -> Compilation:
    from qllm_kernels.gpu import rotary
    from qllm_kernels.gpu.shapes import power_of_2

    same = "query key value near far_query window_key window_value raw_key raw_value"
    pointers = case.pointers(
        same, cos="fp32", sin="fp32", far="fp32", positions="i64", window_rows="i64", raw_rows="i64"
    )
    width = power_of_2(case.dim)
    constants = {
        "QUERY_HEADS": 8 * case.group,
        "D": case.dim,
        "DV": case.dim,
        "ROTARY": case.dim // 2,
        "BD": width,
        "BV": width,
    }
    return Compilation(
        rotary.turn_and_store,
        pointers,
        {**constants, "INTERLEAVED": interleaved, "FAR": True, "RAW_VALUE": False, "BT": 16, "num_warps": 4},
    )


def _pages(case: Case, kernel: str) -> Compilation:
    from qllm_kernels.gpu import pages

    kinds = {
        "move_pages": {"source": case.dtype, "target": case.dtype},
        "quantise": {"source": case.dtype, "target": "u8", "scales": "fp32"},
        "dequantise": {"source": "u8", "target": case.dtype, "scales": "fp32"},
    }
    pointers = case.pointers("", moves="i64", counts="i32", **kinds[kernel])
    constants = {"ROWS": 1, "SIZE": case.block * 128, "BE": 4096, "num_warps": 8}
    wide = tuple(f"stride_{x}_{y}" for x in ("source", "target") for y in ("head", "page"))
    return Compilation(getattr(pages, kernel), pointers, constants, wide=wide)


def _admit(case: Case, slots: int) -> Compilation:
    from qllm_kernels.gpu import residency

    tables = dict.fromkeys(("counts", "slot_of", "page_of", "used", "clock"), "i32")
    pointers = case.pointers("", ids="i64", valid="i1", slots="i64", moves="i64", tally="i64", **tables)
    constants = {"VALID": True, "BK": 32, "BS": slots, "num_warps": 4 if slots <= 256 else 8, "num_stages": 1}
    return Compilation(residency.admit, pointers, constants)


KERNELS: dict[str, Callable[[Case], Compilation]] = {
    "segment_attention, prefill": lambda case: _attention(case, 256, 1),
    "segment_attention, decode": lambda case: _attention(case, 1, 32),
    "segment_mass, prefill": lambda case: _mass(case, 256),
    "segment_mass, decode": lambda case: _mass(case, 1),
    "score_blocks, prefill": lambda case: _select(case, 32),
    "score_blocks, decode": lambda case: _select(case, 1),
    "score_blocks of every key, prefill": lambda case: _select(case, 32, every_key=True),
    "score_blocks of every key, decode": lambda case: _select(case, 1, every_key=True),
    "score_blocks beside a question, prefill": lambda case: _select(case, 32, guided=True),
    "score_blocks beside a question, decode": lambda case: _select(case, 1, every_key=True, guided=True),
    "score_blocks of bounds, decode": lambda case: _select(case, 1, bounds=True),
    "score_blocks of bounds beside a question, decode": lambda case: _select(case, 1, guided=True, bounds=True),
    "append_and_score": lambda case: _select(case, 1, appends=True),
    "append_and_score beside a question": lambda case: _select(case, 1, guided=True, appends=True),
    "append_and_score of bounds": lambda case: _select(case, 1, bounds=True, appends=True),
    "append_and_score of bounds beside a question": lambda case: _select(
        case, 1, guided=True, bounds=True, appends=True
    ),
    "choose": lambda case: _choose(case, guided=False),
    "choose beside a question": lambda case: _choose(case, guided=True),
    "refine": _refine,
    "average_keys": _average_keys,
    "best_keys": _best_keys,
    "token_mass": _token_mass,
    "mean_of_best": _mean_of_best,
    "sum_tiles": lambda case: _prefix(case, "sum_tiles"),
    "sum_before": lambda case: _prefix(case, "sum_before"),
    "turn_and_store": lambda case: _arrival(case, interleaved=False),
    "turn_and_store, interleaved": lambda case: _arrival(case, interleaved=True),
    "move_pages": lambda case: _pages(case, "move_pages"),
    "quantise": lambda case: _pages(case, "quantise"),
    "dequantise": lambda case: _pages(case, "dequantise"),
    "admit, 64 slots": lambda case: _admit(case, 64),
    "admit, 1024 slots": lambda case: _admit(case, 1024),
}
_MATRIX = (
    "segment_attention",
    "segment_mass",
    "score_blocks",
    "append_and_score",
    "refine",
    "token_mass",
)  # kernels that multiply matrices
_SPLIT = ("segment_attention", "score_blocks")
#: axes that the compilation of a kernel depends on
AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(KERNELS, ("arch", "dtype")),
    **{name: tuple(_VALUES) for name in KERNELS if name.startswith(("segment_attention", "segment_mass"))},
    **{
        name: ("arch", "dtype", "dim", "group")
        for name in KERNELS
        if name.startswith(("score_blocks", "append_and_score"))
    },
    "score_blocks of every key, decode": ("arch", "dtype", "dim", "group", "block"),
    "score_blocks of every key, prefill": ("arch", "dtype", "dim", "group", "block"),
    "score_blocks beside a question, decode": ("arch", "dtype", "dim", "group", "block"),
    "choose": ("arch",),
    "refine": ("arch", "dtype", "dim", "group", "block"),
    "choose beside a question": ("arch",),
    "token_mass": ("arch", "dtype", "dim", "group", "softcap"),
    "average_keys": ("arch", "dtype", "block"),
    "best_keys": ("arch", "dtype", "block"),
    "mean_of_best": ("arch", "dtype", "block"),
    "admit, 64 slots": ("arch",),
    "admit, 1024 slots": ("arch",),
}


def multiplies(name: str) -> bool:
    """Whether the binary must hold tensor-core instructions."""
    return name.startswith(_MATRIX)


def counts(name: str) -> bool:
    """Whether the program that ends last does something for all."""
    return name == "refine" or name.startswith("append_and_score") or (name.startswith(_SPLIT) and "decode" in name)


def _met(case: Case) -> set[tuple[Any, ...]]:
    """The values that meet in this case: each of its own; of attention, types and head sizes together."""
    alone = {(axis, getattr(case, axis)) for axis in AXES[case.name]}
    return alone | {(case.dtype, case.dim)} if case.name.startswith("segment_attention") else alone


def covering(name: str) -> list[Case]:
    """Cases of a kernel in which everything meets that shall; Llama-3-8B's shape in bf16 for those compiled in `make test`."""
    axes = AXES[name]
    product = [
        Case(name, **dict(zip(axes, values, strict=True))) for values in itertools.product(*(_VALUES[a] for a in axes))
    ]
    chosen = [case for case in AGAIN if case.name == name] or [Case(name)]
    missing = set().union(*map(_met, product)) - set().union(*map(_met, chosen))
    draw = random.Random(0)
    while missing:
        best = max(draw.sample(product, min(len(product), 300)), key=lambda case: len(_met(case) & missing))
        if _met(best) & missing:
            chosen.append(best)
            missing -= _met(best)
    return chosen


#: compiled again by the tests
AGAIN = (
    Case("segment_attention, prefill", arch=90),
    Case("segment_attention, prefill", arch=86),
    Case("segment_attention, prefill", arch=100),
    Case("segment_attention, decode", arch=80),
    Case("segment_mass, prefill", arch=120),
    Case("score_blocks, decode", arch=89),
    Case("score_blocks of every key, prefill", arch=80),
    Case("score_blocks of bounds beside a question, decode", arch=90),
    Case("append_and_score of bounds beside a question", arch=90),
    Case("append_and_score of bounds beside a question", arch=80),
    Case("choose beside a question", arch=86),
    Case("refine", arch=90),
    Case("admit, 64 slots", arch=90),
    Case("quantise", arch=80),
    Case("turn_and_store", arch=90),
)
