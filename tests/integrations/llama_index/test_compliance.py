"""Our own model through the compliance suite."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from llama_index.core.llms.function_calling import FunctionCallingLLM

from qllm_integrations.llama_index import QLLM
from qllm_runtime.errors import InvalidRequestError
from tests.integrations.llama_index.compliance import LLMCompliance
from tests.integrations.llama_index.fake_engine import FakeEngine
from tests.integrations.llama_index.tiny_model import save_tiny


class TestScripted(LLMCompliance):
    """The translation alone, with an engine that answers from a script."""

    structured_kwargs: ClassVar[dict[str, Any]] = {"max_tokens": 200}  # bytes

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        return QLLM.from_engine(FakeEngine("Good evening to you, dear reader."))

    @pytest.fixture
    def slow_llm(self) -> FunctionCallingLLM:
        return QLLM.from_engine(FakeEngine("Good evening. " * 200, step=0.005))

    @pytest.fixture
    def error_type(self) -> type[Exception]:
        return InvalidRequestError


class TestTiny(LLMCompliance):
    """The real engine on a tiny random model."""

    structured_kwargs: ClassVar[dict[str, Any]] = {"max_tokens": 200}  # bytes

    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return save_tiny(tmp_path_factory.mktemp("tiny"))

    @pytest.fixture
    def llm(self, checkpoint: str) -> FunctionCallingLLM:
        return QLLM(
            model=checkpoint,
            memory={"n_local": 128, "exec_block_size": 32, "block_size": 16, "n_init": 8},
            max_tokens=16,
        )

    @pytest.fixture
    def error_type(self) -> type[Exception]:
        return InvalidRequestError
