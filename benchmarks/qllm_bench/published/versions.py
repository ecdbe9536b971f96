"""What answers and scores of a task depend on besides the text, as digits that change with it."""

from __future__ import annotations

import inspect
import random
import re
import sys
import zlib
from dataclasses import astuple
from functools import cache, partial
from typing import Any

from qllm_bench.published.example import Example, Metric
from qllm_bench.published.suite import Suite

_SAMPLES, _SIZES = 7, (0, 64)  # questions, and sizes above the least, that stand for all that a rule makes


def source(function: Any) -> str:
    """Source of a function with all functions and constants of its module that it names; of a `partial`, with its arguments."""
    if isinstance(function, partial):
        return "\n".join(map(source, (function.func, *function.args)))
    module = vars(sys.modules[function.__module__])
    found: dict[str, str] = {}
    left = [function.__name__]
    while left:
        name = left.pop()
        found[name] = inspect.getsource(module[name]) if inspect.isfunction(module[name]) else repr(module[name])
        left += {word for word in re.findall(r"\w+", found[name]) if _own(module, word)} - {*found}
    return "\n".join(found[name] for name in sorted(found))


def _own(module: dict[str, Any], name: str) -> bool:
    value = module.get(name)
    return (inspect.isfunction(value) and value.__module__ == module["__name__"]) or (
        isinstance(value, str | tuple) and name.isupper()
    )


def of_question(example: Example, metric: Metric) -> str:
    """Eight hexadecimal digits that change with text, prompt, answers, limit and metric of a question."""
    return _digits(repr(astuple(example)), source(metric))


@cache
def of_rule(suite: Suite, task: str) -> str:
    """Eight hexadecimal digits that change with what the rule of a task makes, and with its metric."""
    rule = suite.rules[task]
    makers = [maker for maker in (rule.make, rule.brief) if maker is not None]
    made = [
        maker(random.Random(number), number, rule.least + more)
        for maker in makers
        for number in range(_SAMPLES)
        for more in _SIZES
    ]
    return _digits(repr([astuple(example) for example in made]), source(suite.tasks[task].metric))


def _digits(*texts: str) -> str:
    return f"{zlib.crc32(chr(0).join(texts).encode()):08x}"
