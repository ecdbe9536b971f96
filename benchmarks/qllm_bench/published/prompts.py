"""The published prompts, word for word, from `prompts.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files


@cache
def prompts(suite: str) -> Mapping[str, str]:
    """Prompts of a suite by task, with their fields in braces; `{context}` is the text."""
    table = tomllib.loads((files(__package__) / "prompts.toml").read_text(encoding="utf-8"))
    return dict(table[suite])
