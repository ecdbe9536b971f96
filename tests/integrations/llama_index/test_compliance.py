"""Our own model through the compliance suite."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from llama_index.core.llms.function_calling import FunctionCallingLLM

from qllm_integrations.llama_index import QLLM
from qllm_runtime.errors import InvalidRequestError
from tests.integrations.llama_index.compliance import LLMCompliance
from tests.integrations.llama_index.fake_engine import FakeEngine


class TestScripted(LLMCompliance):
    """The translation alone, with an engine that answers from a script."""

    structured_kwargs: ClassVar[dict[str, Any]] = {"max_tokens": 200}  # bytes

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        return QLLM.from_engine(FakeEngine("Good evening to you, dear reader."))

    @pytest.fixture
    def slow_llm(self) -> FunctionCallingLLM:
        return QLLM.from_engine(FakeEngine("Good evening. " * 200, delay=0.005))

    @pytest.fixture
    def error_type(self) -> type[Exception]:
        return InvalidRequestError
