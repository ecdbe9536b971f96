"""What `qllm bench policies` compares: one setting changed at a time, the attention budget kept unless it is what changes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml

from qllm_bench.arguments import split_list
from qllm_bench.subject import ORDERS, REREAD, Order, Setting, Subject
from qllm_runtime.config import Selection, Summary
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError

Named = tuple[str, Setting]

BASE = "base"
_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_BLOCKS = (8, 16, 32, 64, 128)
_PIECES = (16, 32, 64, 128, 256)
#: Policies whose block and piece size are swept, with what their rows' names begin with.
_SWEPT = {"qllm": "", "infllm": "infllm, "}


def identity(setting: Setting) -> str:
    """Eight hexadecimal digits that change with everything about a setting but its name."""
    facts = f"{setting.memory.model_dump_json()} {setting.order} {setting.oracle}"
    return f"{zlib.crc32(facts.encode()):08x}"


def _policy(subject: Subject, order: Order) -> Iterator[Named]:
    for name in ("qllm", "infllm", "streaming", "lm-infinite", "oracle"):
        yield name, subject.setting(name, order)
    published: dict[str, Any] = {
        "faithful": True,
        "selection": "shared",
        "summary": "published",
        "repr_topk": min(4, subject.base.block_size),
    }
    # the published code has to know the question before it reads
    yield "faithful", subject.setting("qllm", "first" if order == "first" else "both", **published)
    yield "infllm, faithful", subject.setting("infllm", order, **published)


def _order(subject: Subject, order: Order) -> Iterator[Named]:
    for place in ORDERS:
        yield place if place in REREAD else f"question {place}", subject.setting("qllm", place)


def _budget(subject: Subject, order: Order) -> Iterator[Named]:
    """Half of the budget is window, half looked up."""
    block = subject.base.block_size
    for budget in budgets(subject):
        half = budget // 2
        changes: dict[str, Any] = {
            "n_local": half,
            "topk": half // block,
            "exec_block_size": min(subject.base.exec_block_size, half // 2),
        }
        # a window alone cannot be wider than the model was trained for
        alone = ("streaming",) if budget <= subject.trained_length else ()
        for policy in ("qllm", "infllm", "oracle", *alone):
            yield f"{policy}, {budget}", subject.setting(policy, order, **changes)


def budgets(subject: Subject) -> list[int]:
    """Attention budgets in tokens: a quarter of the trained length to twice of it, at least two blocks each."""
    lengths = (subject.trained_length * factor // 4 for factor in (1, 2, 4, 8))
    return [n for n in lengths if n >= 4 * subject.base.block_size]


def fitting(sweeps: Mapping[str, Sequence[Named]], question: int) -> tuple[dict[str, Sequence[Named]], list[int]]:
    """Sweeps without the attention budgets whose window (half of each) cannot hold a question.

    Args:
        sweeps: Settings by sweep.
        question: Longest question, in tokens.

    Returns:
        The sweeps, and the budgets left out of "budget".
    """
    named = sweeps.get("budget", ())
    narrow = {_budget_of(name) for name, setting in named if name != BASE and setting.memory.n_local < question}
    kept = [(name, setting) for name, setting in named if _budget_of(name) not in narrow]
    return {**sweeps, **({"budget": kept} if named else {})}, sorted(map(int, narrow))


def _budget_of(name: str) -> str:
    return name.rpartition(", ")[2]


def _query_weight(subject: Subject, order: Order) -> Iterator[Named]:
    for weight in _WEIGHTS:
        yield f"weight {weight:g}", subject.setting("qllm", order, query_weight=weight)


def _block_size(subject: Subject, order: Order) -> Iterator[Named]:
    tokens = subject.base.topk * subject.base.block_size
    for policy, prefix in _SWEPT.items():
        for size in _BLOCKS:
            if size <= tokens:
                changes: dict[str, Any] = {"block_size": size, "topk": tokens // size}
                yield f"{prefix}{tokens // size} x {size}", subject.setting(policy, order, **changes)


def _summary(subject: Subject, order: Order) -> Iterator[Named]:
    block = subject.base.block_size
    for kind in get_args(Summary):
        sizes = (block,) if kind == "mean" else (4, block) if kind == "max" else (4,)
        for size in sorted({min(size, block) for size in sizes}):
            keys = "" if kind == "mean" else ", every key" if size == block else f", {size} keys"
            yield f"{kind}{keys}", subject.setting("qllm", order, summary=kind, repr_topk=size)


def _selection(subject: Subject, order: Order) -> Iterator[Named]:
    for kind in get_args(Selection):
        yield kind, subject.setting("qllm", order, selection=kind)


def _piece(subject: Subject, order: Order) -> Iterator[Named]:
    for policy, prefix in _SWEPT.items():
        for size in _PIECES:
            if size <= subject.base.n_local:
                yield f"{prefix}pieces of {size}", subject.setting(policy, order, exec_block_size=size)


SWEEPS: dict[str, Callable[[Subject, Order], Iterator[Named]]] = {
    "policy": _policy,
    "order": _order,
    "budget": _budget,
    "query_weight": _query_weight,
    "block_size": _block_size,
    "summary": _summary,
    "selection": _selection,
    "piece": _piece,
}


def sweep(subject: Subject, names: Sequence[str], order: Order, extra: Sequence[str] = ()) -> dict[str, list[Named]]:
    """Settings by sweep; the first of each is the one that the others are compared with.

    Args:
        subject: Its base settings are what is changed.
        names: Of `SWEEPS`.
        order: Where the question stands.
        extra: Further settings for a sweep "own", each as ``field=value,field=value``; the fields are those of
            `MemoryConfig` and ``order``.

    Raises:
        InvalidConfigError: A field or value that `MemoryConfig` doesn't know.
    """
    base = (BASE, subject.setting("qllm", order))
    found = {name: [base, *SWEEPS[name](subject, order)] for name in names}
    if extra:
        found["own"] = [base, *(_own(subject, order, text) for text in extra)]
    return found


def _own(subject: Subject, order: Order, text: str) -> Named:
    """A setting from ``field=value,field=value``."""
    changes: dict[str, Any] = {}
    for item in split_list(text):
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidConfigError(f"{item!r} is not a setting; write field=value, e.g. query_weight=2,summary=mean.")
        try:
            changes[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InvalidConfigError(
                f"{item!r} is not a setting; its value must be a number, a word, true or false."
            ) from None
    place = changes.pop("order", order)
    if place not in ORDERS:
        raise InvalidRequestError(f"Unknown order {place!r}; known: {', '.join(ORDERS)}.")
    return text, subject.setting(str(changes.pop("policy", "qllm")), place, **changes)
