"""The LangChain notebooks of the cookbook run from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("name", ["01_ask_a_book_with_langchain", "02_chains_structured_output_and_an_agent"])
def test_notebook(name: str, run_notebook: Callable[[str], Any]) -> None:
    run_notebook(name)
