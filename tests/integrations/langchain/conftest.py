"""Models and engines for the LangChain tests."""

from __future__ import annotations

import pytest
from fake_engine_lc import FakeEngine
from ishmael import save

from qllm_integrations.langchain import QLLMChat


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that answers "Ishmael"."""
    return save(tmp_path_factory.mktemp("ishmael"))


@pytest.fixture(scope="session")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one, with other random weights."""
    return save(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def llm(engine: FakeEngine) -> QLLMChat:
    return QLLMChat.from_engine(engine)
