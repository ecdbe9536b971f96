"""Every example in a docstring runs, with the model that it names: the reader."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

from qllm_integrations.langchain import DocumentQA, QLLMChat


async def run(source: str, names: dict[str, Any]) -> None:
    """Run a snippet in which `await` may stand anywhere."""
    code = compile(source, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.iscoroutine(result):
        await result


def snippets(text: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r" *```python\n(.*?) *```", text, re.DOTALL)]


async def test_the_chat_model() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    blocks = snippets(inspect.getdoc(QLLMChat) or "")
    assert len(blocks) >= 10
    for block in blocks:
        await run(block, names)
    assert isinstance(names["ai"].text, str)


async def test_document_qa() -> None:
    names: dict[str, Any] = {"DocumentQA": DocumentQA, "QLLMChat": QLLMChat, "docs": ["Edda Thorne wrote the letter."]}
    for block in snippets(inspect.getdoc(DocumentQA) or ""):
        await run(block, names)
