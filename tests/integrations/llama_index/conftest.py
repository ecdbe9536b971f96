"""Engines and events for the LlamaIndex tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qllm_integrations.llama_index import QLLM
from tests.integrations.llama_index.compliance import Recorder, recording
from tests.integrations.llama_index.fake_engine import FakeEngine


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as handler:
        yield handler


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("It is 4711.")


@pytest.fixture
def llm(engine: FakeEngine) -> QLLM:
    return QLLM.from_engine(engine)
