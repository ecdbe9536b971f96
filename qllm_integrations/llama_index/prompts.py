"""Prompt templates whose variables say which text is the document and which is the query."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, CitableBlock, ContentBlock, MessageRole, TextBlock
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.output_parsers.selection import SelectionOutputParser
from llama_index.core.prompts import BasePromptTemplate, SelectorPromptTemplate
from llama_index.core.question_gen.output_parser import SubQuestionOutputParser
from llama_index.core.types import BaseOutputParser

from qllm_integrations.llama_index.messages import QUERY_KEY, SCHEMA_KEY

#: Variables that LlamaIndex's own templates use for retrieved text.
CONTEXT_VARIABLES = ("context_str", "context_msg")


def routed_messages(
    prompt: BasePromptTemplate, arguments: dict[str, Any], llm: BaseLLM, documents: Sequence[CitableBlock] | None = None
) -> list[ChatMessage]:
    """Format a template with its context as document blocks and its `query_str` named as the query.

    Args:
        prompt: Any template. The text of `{context_str}` or `{context_msg}` becomes a document where it stands.
        arguments: Values of its variables.
        llm: Selects among the variants of a `SelectorPromptTemplate`.
        documents: Blocks to stand for the context, instead of a value in `arguments`.
    """
    chosen = prompt.select(llm) if isinstance(prompt, SelectorPromptTemplate) else prompt
    values = {**chosen.kwargs, **arguments}
    contexts: dict[str, list[CitableBlock]] = {}
    for variable in CONTEXT_VARIABLES:
        if variable in (chosen.function_mappings or {}) or (variable not in values and documents is None):
            continue
        mark = f"context-{uuid.uuid4().hex}"
        contexts[mark] = list(documents) if documents is not None else _blocks(values[variable])
        values[variable] = mark
    messages = chosen.format_messages(llm=llm, **values)
    messages = [_insert(message, contexts) for message in messages]
    if documents and not any(isinstance(block, CitableBlock) for message in messages for block in message.blocks):
        messages[-1] = messages[-1].model_copy(update={"blocks": [*documents, *messages[-1].blocks]})
    query = values.get("query_str")
    if query:
        last_user = max(
            (i for i, message in enumerate(messages) if message.role is MessageRole.USER), default=len(messages) - 1
        )
        _annotate(messages, last_user, QUERY_KEY, str(query))
    schema = parser_schema(chosen.output_parser, values) or parser_schema(getattr(llm, "output_parser", None), values)
    if schema is not None:
        _annotate(messages, -1, SCHEMA_KEY, schema)
    return messages


def parser_schema(parser: BaseOutputParser | None, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """JSON schema of what one of LlamaIndex's own output parsers accepts, so that decoding can keep to it.

    Args:
        parser: The parser of a prompt template, or of the model.
        values: Values of the template's variables; they say which tools and choices there are.
    """
    if isinstance(parser, PydanticOutputParser):
        return dict(parser.output_cls.model_json_schema())
    if isinstance(parser, SubQuestionOutputParser):
        name: dict[str, Any] = {"type": "string", "maxLength": 64}
        tools = _mapping(values.get("tools_str"))
        if tools:
            name = {"enum": list(tools)}
        item = _object(sub_question={"type": "string", "minLength": 1, "maxLength": 300}, tool_name=name)
        return _object(items={"type": "array", "items": item, "minItems": 1, "maxItems": 8})
    if isinstance(parser, SelectionOutputParser):
        choice: dict[str, Any] = {"type": "integer", "minimum": 1}
        if values.get("num_choices"):
            choice["maximum"] = int(values["num_choices"])
        item = _object(choice=choice, reason={"type": "string", "maxLength": 200})
        return {"type": "array", "items": item, "minItems": 1, "maxItems": int(values.get("max_outputs") or 1)}
    return None


def _mapping(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _blocks(context: Any) -> list[CitableBlock]:
    # one of the stock synthesizers passes a list of chunks here
    texts = [str(text) for text in context] if isinstance(context, (list, tuple)) else [str(context or "")]
    return [CitableBlock(title="", source="", content=text) for text in texts if text.strip()]


def _insert(message: ChatMessage, contexts: dict[str, list[CitableBlock]]) -> ChatMessage:
    blocks: list[ContentBlock] = []
    changed = False
    for block in message.blocks:
        parts = _insert_block(block, contexts)
        changed |= parts != [block]
        blocks.extend(parts)
    if not changed:
        return message
    role = message.role
    if role in (MessageRole.SYSTEM, MessageRole.DEVELOPER) and any(isinstance(block, CitableBlock) for block in blocks):
        role = MessageRole.USER  # documents are read in user turns
    return ChatMessage(role=role, blocks=blocks, additional_kwargs=dict(message.additional_kwargs))


def _insert_block(block: ContentBlock, contexts: dict[str, list[CitableBlock]]) -> list[ContentBlock]:
    for mark, documents in contexts.items():
        if isinstance(block, TextBlock) and mark in block.text:
            before, after = block.text.split(mark, 1)
            rest = _insert_block(TextBlock(text=after.lstrip()), contexts)
            head = _insert_block(TextBlock(text=before.rstrip()), contexts)
            return [*_solid(head), *documents, *_solid(rest)]
        if isinstance(block, CitableBlock):
            text = "".join(part.text for part in block.content if isinstance(part, TextBlock))
            if mark in text:
                whole = "\n\n".join(
                    part.text for document in documents for part in document.content if isinstance(part, TextBlock)
                )
                return [CitableBlock(title=block.title, source=block.source, content=text.replace(mark, whole))]
    return [block]


def _solid(blocks: list[ContentBlock]) -> list[ContentBlock]:
    return [block for block in blocks if not (isinstance(block, TextBlock) and not block.text.strip())]


def _annotate(messages: list[ChatMessage], position: int, key: str, value: Any) -> None:
    message = messages[position]
    messages[position] = message.model_copy(update={"additional_kwargs": {**message.additional_kwargs, key: value}})
