"""`with_structured_output`: schemas of every kind, enforced while decoding, and the parser behind them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, BaseMessageChunk
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass

from qllm_integrations.langchain.tools import convert, inlined
from qllm_runtime.errors import InvalidRequestError

Method = Literal["json_schema", "function_calling", "json_mode"]
Schema = Mapping[str, Any] | type
_FUNCTION = frozenset({"function", "parameters", "input_schema"})
_KEYWORDS = frozenset((
    "type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", "not", "if", "properties", "patternProperties",
    "additionalProperties", "propertyNames", "required", "minProperties", "maxProperties", "dependentRequired",
    "dependentSchemas", "items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems", "pattern",
    "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
))  # fmt: skip


class SchemaOutputParser(BaseCumulativeTransformOutputParser[Any]):
    """Reads a structured answer: an instance for pydantic classes (1 and 2), a dictionary for everything else.

    While streaming, dictionaries grow; an instance appears once, when it is complete. An answer that is not complete
    JSON, usually because `max_tokens` cut it off, raises `OutputParserException`; it is never completed silently.

    Attributes:
        schema_class: Pydantic class to validate with, or None.
        from_tool: Read the arguments of the first tool call instead of the text.
    """

    schema_class: Any = None
    from_tool: bool = False

    @property
    def _type(self) -> str:
        return "qllm-schema"

    def parse(self, text: str) -> Any:
        """The value of a whole answer."""
        return self.parse_result([Generation(text=text)])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The value of an answer; with `partial`, of as much of it as there is (None: nothing yet)."""
        generation = result[0]
        message = generation.message if isinstance(generation, ChatGeneration) else None
        if partial:
            return None if self.schema_class or self.from_tool else _grow(generation.text)
        if self.from_tool:
            calls = message.tool_calls if isinstance(message, AIMessage) else []
            if not calls:
                raise self._failure(generation.text, message, "it holds no complete tool call")
            value: Any = calls[0]["args"]
        else:
            try:
                value = json.loads(generation.text)
            except ValueError as error:
                raise self._failure(generation.text, message, f"it is not valid JSON ({error})") from None
        if self.schema_class is None:
            return value
        try:
            validate = getattr(self.schema_class, "model_validate", None) or self.schema_class.parse_obj
            return validate(value)
        except ValueError as error:
            raise OutputParserException(
                f"The answer does not fit {self.schema_class.__name__}: {error}", llm_output=json.dumps(value)
            ) from error

    def _failure(self, text: str, message: BaseMessage | None, reason: str) -> OutputParserException:
        return unreadable(reason, text, None if message is None else message.response_metadata.get("finish_reason"))

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        growing = _Growing(self)
        for chunk in input:
            yield from growing.add(chunk)
        yield from growing.finish()

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        growing = _Growing(self)
        async for chunk in input:
            for value in growing.add(chunk):
                yield value
        for value in growing.finish():
            yield value


def unreadable(reason: str, text: str, finish_reason: str | None) -> OutputParserException:
    """The error for an answer without what it was to hold."""
    remedy = " It was cut off at max_tokens: raise max_tokens." if finish_reason == "length" else ""
    return OutputParserException(f"The answer cannot be read: {reason}.{remedy}", llm_output=text)


class _Growing:
    """The values of an answer as it is written: each one once."""

    def __init__(self, parser: SchemaOutputParser) -> None:
        self._parser = parser
        self._whole: Any = None
        self._last: Any = None

    def add(self, chunk: str | BaseMessage) -> Iterator[Any]:
        self._whole = _add(self._whole, chunk)
        value = self._parser.parse_result([self._whole], partial=True)
        if value is not None and value != self._last:
            self._last = value
            yield value

    def finish(self) -> Iterator[Any]:
        if self._whole is not None and (value := self._parser.parse_result([self._whole])) != self._last:
            yield value


def structured(
    llm: Any, schema: Schema | None, *, method: Method, include_raw: bool, strict: bool | None
) -> Runnable[LanguageModelInput, Any]:
    """The runnable behind `QLLMChat.with_structured_output`."""
    if method not in ("json_schema", "function_calling", "json_mode"):
        raise InvalidRequestError(f"Unknown method {method!r}; use 'json_schema', 'function_calling' or 'json_mode'.")
    if schema is None and method != "json_mode":
        raise InvalidRequestError(f"method={method!r} needs a schema; only 'json_mode' works without one.")
    schema, strict = _unwrapped(schema, strict)
    schema_class = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
    trace = (
        {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
        if schema
        else {}
    )
    if schema is None:
        bound = llm.bind(response_format={"type": "json_object"})
    elif method == "function_calling":
        choice = {"type": "any", "partial": True}  # the parser raises, and shows what there is as `raw`
        bound = llm.bind_tools([_tool(schema)], tool_choice=choice, strict=strict, **trace)
    else:
        body = {"name": "answer", "schema": to_json_schema(schema, strict), "strict": strict is not False}
        if method == "json_mode":  # the prompt says what is wanted; the schema is enforced all the same
            body["shown"] = False
        bound = llm.bind(response_format={"type": "json_schema", "json_schema": body}, **trace)
    parser = SchemaOutputParser(schema_class=schema_class, from_tool=method == "function_calling")
    if not include_raw:
        return bound | parser  # type: ignore[no-any-return]
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def to_json_schema(schema: Schema, strict: bool | None = None) -> dict[str, Any]:
    """JSON schema of a pydantic class (1 or 2), a TypedDict, an OpenAI function or tool, or a JSON schema.

    Raises:
        InvalidRequestError: None of these, or a dictionary that says nothing about the values.
    """
    if isinstance(schema, Mapping) and not _FUNCTION & schema.keys() and _KEYWORDS & schema.keys():
        return dict(schema)  # LangChain's conversion would drop keywords and refuse a schema without a title
    try:
        shape = convert_to_json_schema(convert(schema, strict))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{schema!r:.80} is not a schema ({error}); pass a pydantic class, a TypedDict or a JSON schema."
        ) from None
    if shape.keys() <= {"title", "description"}:
        raise InvalidRequestError(
            f"{schema!r:.80} says nothing about the values; pass a JSON schema, with 'type' and 'properties' for an object."
        )
    return shape


def _unwrapped(schema: Schema | None, strict: bool | None) -> tuple[Schema | None, bool | None]:
    """The schema in OpenAI's `response_format` or in the body of one, by its name, and whether it is strict.

    Raises:
        InvalidRequestError: A `response_format` without a schema.
    """
    if not isinstance(schema, Mapping):
        return schema, strict
    body: Any = schema
    if wrapped := schema.get("type") == "json_schema":  # in Chat Completions the body is nested, in Responses it is not
        body = schema.get("json_schema", {key: value for key, value in schema.items() if key != "type"})
    inner = body.get("schema") if isinstance(body, Mapping) else None
    if isinstance(inner, Mapping) and not (_KEYWORDS | _FUNCTION) & body.keys():
        names = {"title": body.get("name"), "description": body.get("description")}
        named = {**inner, **{key: value for key, value in names.items() if value}}
        return named, body.get("strict") if strict is None else strict
    if wrapped:
        raise InvalidRequestError(
            f"{schema!r:.80} holds no schema; use {{'type': 'json_schema', 'json_schema': {{'name', 'schema'}}}}."
        )
    return schema, strict


def _tool(schema: Schema) -> Schema:
    """A schema as the tool whose arguments it describes.

    Raises:
        InvalidRequestError: It is not a schema, or its values are not objects.
    """
    shape = to_json_schema(schema)
    plain = shape == schema
    if plain:
        shape = inlined(shape)
    if shape.get("type", "object") != "object" or (plain and not {"type", "properties"} & shape.keys()):
        raise InvalidRequestError(
            f"{schema!r:.80} does not describe an object, and the arguments of a tool are one; use method='json_schema', or "
            "an object with a property for the value."
        )
    if not plain:
        return schema
    if "properties" in shape or "title" not in shape:
        return shape
    # LangChain's conversion would drop everything but the title of an object whose properties have no names
    named = {"name": shape.pop("title"), "description": shape.pop("description", ""), "parameters": shape}
    return {"type": "function", "function": named}


def response_schema(response_format: Mapping[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """JSON schema of a `response_format` in OpenAI's form, whether it is strict, and whether it is shown.

    Raises:
        InvalidRequestError: A form other than `json_schema`, `json_object` or `text`.
    """
    kind = response_format.get("type")
    if kind == "json_object":
        return {"type": "object"}, False, False
    body = response_format.get("json_schema")
    if kind == "json_schema" and isinstance(body, Mapping) and isinstance(body.get("schema"), Mapping):
        return dict(body["schema"]), body.get("strict") is not False, body.get("shown", True)
    raise InvalidRequestError(
        f"response_format of type {kind!r} is not supported; use {{'type': 'json_object'}} or "
        "{'type': 'json_schema', 'json_schema': {'name', 'schema'}}."
    )


def _grow(text: str) -> Any:
    try:
        value = parse_partial_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value else None


def _add(whole: Any, chunk: str | BaseMessage) -> Any:
    if isinstance(chunk, BaseMessageChunk):
        added: Any = ChatGenerationChunk(message=chunk)
    elif isinstance(chunk, BaseMessage):
        return ChatGeneration(message=chunk)
    else:
        from langchain_core.outputs import GenerationChunk

        added = GenerationChunk(text=chunk)
    return added if whole is None else whole + added
