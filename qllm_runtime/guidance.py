"""Whether a text can guide the lookups as the question. Importing this loads no torch."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from qllm_runtime.types import QuerySource

if TYPE_CHECKING:
    from qllm_runtime.engine import QLLM


def guiding(engine: QLLM, query: str, source: QuerySource, *, warn: bool) -> tuple[str, QuerySource]:
    """The question as it can guide: a message too long to be a question by itself is read, but guides no lookup.

    Only a question given by name is refused by the engine for being too long.

    Args:
        engine: Who answers.
        query: The question found in a conversation ("" when there is none).
        source: Which rule found it.
        warn: Warn where the lookups are unguided; there are documents.
    """
    limit = engine.memory.n_local
    found = source in ("message", "fallback") and engine.memory.policy != "full"
    if found and len(query.encode("utf-8", "replace")) > limit and engine.count_tokens(query) > limit:
        problem = f"The message has more than n_local={limit} tokens, too many for a question"
        query, source = "", "none"
    else:
        problem = "There is no question in the messages"
    if source == "none" and warn:
        warnings.warn(f"{problem}: lookups are unguided. Pass the question as query=.", stacklevel=4)
    return query, source
