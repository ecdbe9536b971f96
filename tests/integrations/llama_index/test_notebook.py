"""The LlamaIndex notebook of the cookbook runs from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_notebook(run_notebook: Callable[[str], Any]) -> None:
    run_notebook("03_llama_index_query_and_chat_engines")
