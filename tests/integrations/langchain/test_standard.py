"""LangChain's standard suites on a tiny local model, every capability declared.

Not met by a tiny model, because they ask it to decide or to copy (a real model is needed): `test_tool_calling` (both),
`test_tool_calling_async`, `test_agent_loop` (both), `test_unicode_tool_call_integration`. Skipped: images, audio, VCR,
serialisation (LangChain only loads classes it knows by name).
"""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pdf_by_hand import pdf_bytes

from qllm_integrations.langchain import QLLMChat

DECIDES = "the tiny model cannot decide or copy, nor can the reader (tried: wrong argument, no second call); needs a real model"
_BOOK = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. " * 3


class Declared:
    """What `QLLMChat` can do."""

    path = ""
    other = ""

    @pytest.fixture(autouse=True)
    def _models(self, tiny_path: str, other_path: str) -> None:
        Declared.path, Declared.other = tiny_path, other_path

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return QLLMChat

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.path}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"HF_TOKEN": "a-token"}, {"model": "reader"}, {"hf_token": "a-token"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_pdf_inputs(self) -> bool:
        return True

    @property
    def supports_pdf_tool_message(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str | None:
        return self.other

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {
            "invoke": ["cache_read_input", "cache_creation_input"],
            "stream": ["cache_read_input", "cache_creation_input"],
        }


class TestUnit(Declared, ChatModelUnitTests):
    pass


class TestIntegration(Declared, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        page = SimpleNamespace(content=pdf_bytes("Call me Ishmael."))
        monkeypatch.setattr(httpx, "get", lambda *_args, **_kwargs: page)

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        return self._ask_cached(QLLMChat(model=self.path), stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        llm = QLLMChat(model=self.path)
        first = self._ask_cached(llm, stream)
        message = self._ask_cached(llm, stream)
        assert first.usage_metadata["input_token_details"]["cache_creation"] > 0
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message

    def _ask_cached(self, llm: QLLMChat, stream: bool) -> AIMessage:
        document = {
            "type": "text-plain",
            "mime_type": "text/plain",
            "base64": base64.b64encode(_BOOK.encode()).decode(),
            "extras": {"cache_control": {"type": "ephemeral"}},
        }
        messages = [HumanMessage([document, {"type": "text", "text": "Who?"}])]
        if not stream:
            return llm.invoke(messages)
        whole = None
        for chunk in llm.stream(messages):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        return whole

    @pytest.mark.xfail(reason=DECIDES, raises=AssertionError, strict=True)
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_tool_calling(self, model: BaseChatModel) -> None:
        super().test_tool_calling(model)

    @pytest.mark.xfail(reason=DECIDES, raises=AssertionError, strict=True)
    async def test_tool_calling_async(self, model: BaseChatModel) -> None:
        await super().test_tool_calling_async(model)

    @pytest.mark.xfail(reason=DECIDES, raises=AssertionError, strict=True)
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason=DECIDES, raises=AssertionError, strict=True)
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)
