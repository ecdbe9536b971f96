"""What answers and scores of a task depend on besides the text, as digits that change with it."""

from __future__ import annotations

import ast
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
    """What a function does, with all functions and constants of its module that it names; of a `partial`, with its arguments.

    Comments, docstrings, annotations and the layout of the source do not count.
    """
    if isinstance(function, partial):
        return "\n".join(map(source, (function.func, *function.args)))
    module = vars(sys.modules[function.__module__])
    found: dict[str, str] = {}
    left = {function.__name__}
    while left:
        name = left.pop()
        if inspect.isfunction(module[name]):
            tree = ast.parse(inspect.getsource(module[name]))
            found[name] = _plain(tree)
            named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            left |= {word for word in named if _own(module, word)} - {*found}
        else:
            found[name] = repr(module[name])
    return "\n".join(f"{name}: {found[name]}" for name in sorted(found))


def _plain(node: Any) -> str:
    """Syntax tree as text that is the same in every version of Python, as `ast.dump` is not."""
    if isinstance(node, list):
        return f"[{', '.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            value = value[1:]
        if name not in ("annotation", "returns", "ctx") and value not in (None, []):
            parts.append(f"{name}={_plain(value)}")
    return f"{type(node).__name__}({', '.join(parts)})"


def _own(module: dict[str, Any], name: str) -> bool:
    value = module.get(name)
    return (inspect.isfunction(value) and value.__module__ == module["__name__"]) or (
        isinstance(value, str | tuple | int | float | re.Pattern) and name.isupper()
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
