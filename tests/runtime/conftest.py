from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny

from qllm_runtime.engine import QLLM


@pytest.fixture(scope="session")
def llm() -> Iterator[QLLM]:
    """A tiny model that never ends of its own accord."""
    with QLLM(tiny.model(), tiny.tokenizer(), tiny.MEMORY, name="tiny") as llm:
        yield llm
