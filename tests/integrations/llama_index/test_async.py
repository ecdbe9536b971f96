"""The event loop stays free, with the real engine underneath."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage, CitableBlock, TextBlock
from llama_index.core.schema import NodeWithScore, TextNode

from qllm_integrations.llama_index import QLLM, QLLMSynthesizer, WholeDocumentIndex
from tests.integrations.llama_index.compliance import stays_free
from tests.integrations.llama_index.fake_engine import FakeEngine
from tests.integrations.llama_index.tiny_model import save_tiny

TEXT = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 30
QUESTION = "What is the secret number?"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> QLLM:
    llm = QLLM(model=save_tiny(tmp_path_factory.mktemp("tiny")), max_tokens=4)
    llm.complete("Hi")
    return llm


def calls(llm: QLLM) -> dict[str, Callable[[], Awaitable[Any]]]:
    index = WholeDocumentIndex.from_documents([Document(text=TEXT)], llm=llm)
    blocks = [CitableBlock(title="t", source="s", content=TEXT), TextBlock(text=QUESTION)]
    nodes = [NodeWithScore(node=TextNode(text=TEXT))]

    async def stream() -> None:
        response = await index.as_query_engine(streaming=True).aquery(QUESTION)
        async for _ in response.async_response_gen():
            pass

    return {
        "achat": lambda: llm.achat([ChatMessage(blocks=blocks)]),
        "aquery": lambda: index.as_query_engine().aquery(QUESTION),
        "streaming aquery": stream,
        "aretrieve": lambda: index.as_retriever().aretrieve(QUESTION),
        "read_once achat": lambda: index.as_chat_engine().achat(QUESTION),
        "asynthesize": lambda: QLLMSynthesizer(llm).asynthesize(QUESTION, nodes),
    }


async def test_nothing_blocks(llm: QLLM) -> None:
    for name, call in calls(llm).items():
        with blockbuster_ctx():
            assert await call() is not None or name == "streaming aquery"


async def test_loop_keeps_ticking(llm: QLLM) -> None:
    for name, call in calls(llm).items():
        assert await stays_free(call, 0.02), name


async def test_five_megabytes_do_not_stall_the_loop() -> None:
    llm = QLLM.from_engine(FakeEngine("Yes."))
    index = WholeDocumentIndex.from_documents([Document(text="lamps at dusk " * 360_000)], llm=llm)
    engine = index.as_query_engine()
    assert await stays_free(lambda: engine.aquery("When?"), 0.05)
