r"""Constrained decoding: answers that follow a JSON schema, and tool calls that are forced.

A `GrammarProcessor` masks every token the grammar does not allow; llguidance does the parsing (extra `grammar`, part of
`langchain` and `llama-index`). JSON is written in one form only, the one of `json.dumps`: `{"a": 1, "b": [2, 3]}`. The
end token is allowed exactly when the grammar accepts. An answer that `max_tokens` cuts off is not valid JSON; the
request then ends with `finish_reason="length"` and the caller must say so.

What a grammar cannot say is left to whoever validates the answer: formats it does not know, `uniqueItems`, `contains`,
`not`, `if`, dependencies, that exactly one schema of `oneOf` fits, and the assertions (`\b`, `(?=...)`) of a pattern.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import LogitsProcessor

from qllm_runtime.errors import InvalidRequestError, MissingExtraError, UnsupportedModelError
from qllm_runtime.toolcalls import HERMES, CallFormat

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_JSON_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
    "coerce_one_of": True,
}
_VALUES = ("enum", "const", "default", "examples")  # keywords that hold values, not schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keywords that hold schemas by name
# escapes, character classes and assertions of a regular expression, and every other character
_REGEX_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<?[=!]|.", re.DOTALL)
# where a problem stands in the grammar's own text, which the caller has never seen
_PLACE = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?|\n +\d+ \| .*", re.DOTALL)
# What ends the innermost JSON value, in order of preference.
_CLOSERS = ('"', "]", "}", ",")

_tokenizers: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], LLTokenizer]] = WeakKeyDictionary()


class GrammarProcessor(LogitsProcessor):  # type: ignore[misc]
    """Masks the scores of one request with a grammar.

    Where the model wants to end its answer but the grammar does not allow it yet, the probability of the end token goes
    to the token that closes the innermost value. A model that has said all it has to say then ends the JSON instead of
    filling it up to `max_tokens`.

    Args:
        tokenizer: The wrapped tokenizer.
        grammar: A grammar in llguidance's own form.
        what: What the grammar stands for, for error messages.

    Raises:
        InvalidRequestError: The grammar cannot be compiled.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, what: str) -> None:
        from llguidance import LLMatcher

        problem = LLMatcher.validate_grammar(grammar, tokenizer)
        if problem:
            raise InvalidRequestError(
                f"{what} cannot be compiled into a grammar: {' '.join(_PLACE.sub('', problem).split())}. Simplify it."
            )
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._eos = torch.tensor(tokenizer.eos_tokens)
        ids = (tokenizer.tokenize_str(closer) for closer in _CLOSERS)
        self._closers = [tokens[0] for tokens in ids if len(tokens) == 1]
        self._n_consumed = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask `scores` [1, vocab] given the tokens generated so far, `input_ids` [1, n]."""
        for token in input_ids[0, self._n_consumed :].tolist():
            if not self._matcher.consume_token(token):
                raise RuntimeError(f"Token {token} was generated against the grammar: {self._matcher.get_error()}")
        self._n_consumed = input_ids.shape[1]
        allowed = self._allowed(scores.shape[-1])
        end = self._eos.to(scores.device)
        masked = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if not allowed[self._eos].any():
            closer = next((token for token in self._closers if allowed[token]), None)
            if closer is not None:
                masked[0, closer] = torch.logaddexp(scores[0, closer], scores[0, end].logsumexp(-1))
        if not masked.isfinite().any():  # everything the grammar allows had been ruled out by an earlier processor
            masked[0, allowed.to(scores.device)] = 0.0
        return masked

    def _allowed(self, n_vocab: int) -> torch.Tensor:
        """[n_vocab] booleans, on the CPU."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=min(n_vocab, 8 * len(packed)), bitorder="little")
        allowed = torch.zeros(n_vocab, dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits.view(bool))
        return allowed


def json_schema_processor(
    tokenizer: Any,
    schema: Mapping[str, Any],
    *,
    n_vocab: int,
    eos_token_ids: Sequence[int] | None = None,
    open_objects: bool = False,
) -> GrammarProcessor:
    """A processor under which the answer is one JSON value of `schema`; make a fresh one for every request.

    Args:
        tokenizer: A fast tokenizer of transformers.
        schema: JSON schema.
        n_vocab: Width of the model's scores.
        eos_token_ids: Tokens that end an answer (None: the tokenizer's own).
        open_objects: Allow properties the schema does not name where it does not forbid them, as plain JSON schema
            does. By default objects with named properties are closed, as in the strict mode of hosted models.

    Raises:
        InvalidRequestError: The schema cannot be compiled; the message says why.
        MissingExtraError: llguidance is not installed.
        UnsupportedModelError: The tokenizer is not a fast one.
    """
    lark = f"start: %json {_json(schema, open_objects)}\n"
    name = schema.get("title")
    return _processor(tokenizer, lark, f"The schema {name!r}" if name else "The schema", n_vocab, eos_token_ids)


def tool_call_processor(
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]],
    *,
    n_vocab: int,
    names: Sequence[str] | None = None,
    call_format: CallFormat = HERMES,
    parallel: bool = False,
    answer_schema: Mapping[str, Any] | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> GrammarProcessor:
    """A processor under which the answer is a call of one of `tools`; make a fresh one for every request.

    Args:
        tokenizer: A fast tokenizer of transformers.
        tools: Tools in OpenAI form, `{"type": "function", "function": {"name", "parameters"}}`.
        n_vocab: Width of the model's scores.
        names: The tools that may be called (None: all).
        call_format: How the model writes calls, see `qllm_runtime.toolcalls.call_format`.
        parallel: Allow several calls one after the other.
        answer_schema: Allow a JSON answer of this schema instead of calls.
        eos_token_ids: Tokens that end an answer (None: the tokenizer's own).

    Raises:
        InvalidRequestError: No such tool, or a parameter schema that cannot be compiled.
        MissingExtraError: llguidance is not installed.
        UnsupportedModelError: The tokenizer is not a fast one.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    for name in names or ():
        if name not in functions:
            raise InvalidRequestError(f"There is no tool {name!r}; the tools are {sorted(functions)}.")
    rules = []
    for name, function in functions.items():
        if names is None or name in names:
            head = json.dumps({"name": name}, ensure_ascii=False)[:-1] + f', "{call_format.arguments_key}": '
            parameters = function.get("parameters") or {"type": "object", "properties": {}}
            rules.append(f"{_literal(head)} %json {_json(parameters, False)} {_literal('}')}")
    call = f"{_literal(call_format.begin)} body {_literal(call_format.end)}".replace('""', "").strip()
    start = 'call ("\\n" call)*' if parallel and call_format.begin else "call"
    lark = f"start: {start}{' | answer' if answer_schema else ''}\ncall: {call}\nbody: {' | '.join(rules)}\n"
    if answer_schema:
        lark += f"answer: %json {_json(answer_schema, False)}\n"
    return _processor(tokenizer, lark, f"The parameters of the tools {sorted(functions)}", n_vocab, eos_token_ids)


def _processor(tokenizer: Any, lark: str, what: str, n_vocab: int, eos: Sequence[int] | None) -> GrammarProcessor:
    ends = tuple(eos) if eos else (tokenizer.eos_token_id,)
    wrapped = _wrap(tokenizer, n_vocab, ends)
    from llguidance import LLMatcher

    return GrammarProcessor(wrapped, LLMatcher.grammar_from_lark(lark), what)


def _wrap(tokenizer: Any, n_vocab: int, eos: tuple[int, ...]) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise MissingExtraError(
            "Structured output and forced tool calls need llguidance: pip install 'qllm-integrations[grammar]'."
        ) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            "Structured output and forced tool calls need a fast tokenizer (one with a tokenizer.json)."
        )
    per_tokenizer = _tokenizers.setdefault(tokenizer, {})
    key = (n_vocab, eos)
    if key not in per_tokenizer:  # about a second for a vocabulary of 100,000
        per_tokenizer[key] = LLTokenizer(backend.to_str(), n_vocab=n_vocab, eos_token=list(eos))
    return per_tokenizer[key]


def _json(schema: Mapping[str, Any], open_objects: bool) -> str:
    return json.dumps({**_adapt(schema, schema, open_objects), "x-guidance": _JSON_FORM})


def _adapt(node: Any, root: Mapping[str, Any], open_objects: bool) -> Any:
    """A schema as the grammar takes it: patterns without assertions, the names of `propertyNames` as properties.

    Unless `open_objects`, unnamed properties are forbidden in every object schema that names some and says nothing about
    the others.
    """
    if isinstance(node, list):
        return [_adapt(item, root, open_objects) for item in node]
    if not isinstance(node, Mapping):
        return node
    adapted: dict[str, Any] = {}
    for key, value in node.items():
        if key in _VALUES:
            adapted[key] = value
        elif key in _NAMED and isinstance(value, Mapping):
            adapted[key] = {
                _without_assertions(name) if key == "patternProperties" else name: _adapt(schema, root, open_objects)
                for name, schema in value.items()
            }
        elif key == "pattern" and isinstance(value, str):
            adapted[key] = _without_assertions(value)
        else:
            adapted[key] = _adapt(value, root, open_objects)
    names = _listed(node.get("propertyNames"), root)
    if names and not node.keys() & {"properties", "patternProperties", "minProperties", "maxProperties"}:
        adapted["properties"] = dict.fromkeys(names, adapted.get("additionalProperties", True))
        adapted["additionalProperties"] = False
    elif isinstance(node.get("properties"), Mapping) and node.get("type", "object") == "object" and not open_objects:
        adapted.setdefault("additionalProperties", False)
    return adapted


def _listed(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """The strings that a schema lists; none where it lists no strings, or not only strings."""
    if isinstance(schema, Mapping) and str(schema.get("$ref")).startswith("#/"):
        parts = schema["$ref"][2:].split("/")
        schema = root
        for part in parts:
            schema = schema.get(part) if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def _without_assertions(pattern: str) -> str:
    """A regular expression without look-around and word boundaries: it matches all that `pattern` does, and more."""
    kept: list[str] = []
    depth = 0  # of parentheses within an assertion
    for piece in _REGEX_PIECE.findall(pattern):
        if depth:
            depth += piece.startswith("(") - (piece == ")")
        elif piece.startswith("(?"):
            depth = 1
            kept.append("(?:)")
        else:
            kept.append("(?:)" if piece in (r"\b", r"\B") else piece)
    return pattern if depth else "".join(kept)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
