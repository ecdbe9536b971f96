"""What holds an answer to a schema or a tool call: a choice of tools, the grammar, the words. Importing this loads no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.toolcalls import call_format
from qllm_runtime.types import Turn

if TYPE_CHECKING:
    from qllm_runtime.engine import QLLM
    from qllm_runtime.grammar import GrammarProcessor


def tool_choice(choice: Any, names: Collection[str]) -> str:
    """A choice of tools in one of four forms: "auto", "none", "any" or "tool:NAME".

    Args:
        choice: None, a boolean, "auto", "none", "any", "required", the name of a tool, or a dictionary of OpenAI or
            Anthropic.
        names: The tools there are.

    Raises:
        InvalidRequestError: A tool that is not there, a choice of an unknown form, or a forced call without tools.
    """
    found = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        found = named or choice.get("type") or choice
    if found is None or found == "auto":
        return "auto"
    if found is False or found == "none":
        return "none"
    if found is True or found in ("any", "required"):
        if not names:
            raise InvalidRequestError(
                f"tool_choice={choice!r} asks for a tool call, but there are no tools; pass some."
            )
        return "any"
    if isinstance(found, str) and found in names:
        return f"tool:{found}"
    raise InvalidRequestError(
        f"tool_choice={choice!r} names none of the tools; use one of {sorted(names)}, 'auto', 'any', 'required' or 'none'."
    )


def grammar(
    engine: QLLM,
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    parallel: bool = False,
    schema: Mapping[str, Any] | None = None,
    open_objects: bool = False,
) -> tuple[GrammarProcessor, ...]:
    """What makes an answer a forced tool call, or JSON of a schema; nothing where it is free.

    Args:
        engine: Who answers.
        tools: Tools in OpenAI's form.
        choice: As `tool_choice` returns it. With "auto" and a schema the answer is JSON of it or a call of a tool.
        parallel: Allow several calls one after the other.
        schema: JSON schema of the answer.
        open_objects: Allow properties that the schema does not name (not where tools may be called).

    Raises:
        InvalidRequestError: A schema that cannot be compiled.
        UnsupportedModelError: llguidance is missing or the tokenizer is not a fast one.
    """
    calls = choice not in ("auto", "none") or (schema is not None and bool(tools) and choice == "auto")
    if schema is None and not calls:
        return ()
    from qllm_runtime.answering import end_tokens
    from qllm_runtime.grammar import json_schema_processor, tool_call_processor

    head = engine.model.get_output_embeddings()
    width = engine.model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
    common: dict[str, Any] = {
        "n_vocab": int(width),
        "eos_token_ids": sorted(end_tokens(engine.model, engine.tokenizer)),
    }
    if not calls:
        assert schema is not None
        return (json_schema_processor(engine.tokenizer, schema, open_objects=open_objects, **common),)
    return (
        tool_call_processor(
            engine.tokenizer,
            tools,
            names=[choice.removeprefix("tool:")] if choice.startswith("tool:") else None,
            call_format=call_format(getattr(engine.tokenizer, "chat_template", None)),
            parallel=parallel,
            answer_schema=schema if choice == "auto" else None,
            **common,
        ),
    )


def ask_for_json(turns: Sequence[Turn], schema: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns with a schema shown to the model, after the last user turn's text.

    It is not part of the question, and ahead of it would change what a kept memory has read.
    """
    text = "Answer with one JSON object that follows this JSON schema:\n" + json.dumps(schema, ensure_ascii=False)
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        return (*turns, Turn("user", (text,)))
    asked = replace(turns[last], content=(*turns[last].content, text))
    return (*turns[:last], asked, *turns[last + 1 :])
