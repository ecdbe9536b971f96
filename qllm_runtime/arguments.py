"""What callers pass, checked and in one form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.documents import document_from_text
from qllm_runtime.errors import DocumentError, InvalidRequestError
from qllm_runtime.folders import load_path
from qllm_runtime.types import Document, Turn, is_blank

DocumentLike = str | Path | Document
"""Text, the path of a file or a folder, or a document."""
Documents = DocumentLike | Sequence[DocumentLike] | DocumentMemory
"""What may be passed as documents."""


def as_documents(documents: DocumentLike | Sequence[DocumentLike]) -> tuple[Document, ...]:
    """Documents from whatever stands for them: texts, documents, and paths of files or folders.

    Raises:
        DocumentError: There is none, one is empty or cannot be read, or something is not a document.
    """
    items = [documents] if isinstance(documents, str | Path | Document | bytes) else list(documents)
    if not items:
        raise DocumentError("No document was given.")
    whole: list[Document] = []
    for number, item in enumerate(items, 1):
        if isinstance(item, Path):
            whole += load_path(item)
            continue
        if not isinstance(item, str | Document):
            raise DocumentError(f"Document {number} is a {type(item).__name__}; pass text, a Path or a Document.")
        document = document_from_text(item) if isinstance(item, str) else item
        if is_blank(document.text):
            raise DocumentError(f"Document {number} ({document.title or 'untitled'}) has no text.")
        whole.append(document)
    return tuple(whole)


def conversation(
    question: str, documents: Documents | None, system: str | None, history: Sequence[Turn]
) -> tuple[list[Turn], DocumentMemory | None]:
    """The turns of a question about documents, and what was read of these before.

    Raises:
        DocumentError: As `as_documents`.
        InvalidRequestError: An empty question, no documents, or an argument of the wrong type.
    """
    if not isinstance(question, str):
        raise InvalidRequestError(f"The question is of type {type(question).__name__}; it takes a str.")
    if not question.strip():
        raise InvalidRequestError("The question is empty.")
    if documents is None:
        raise InvalidRequestError(
            "No document to ask of; pass documents=, or use chat() for a conversation without one."
        )
    opening = [Turn("system", system)] if system else []
    turns = [*opening, *as_turns(history, None), Turn("user", question)]
    if isinstance(documents, DocumentMemory):
        return turns, documents
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[first] = replace(turns[first], content=(*as_documents(documents), *turns[first].content))
    return turns, None


def as_turns(turns: Any, memory: Any) -> tuple[Turn, ...]:
    """The turns of a conversation, which is about `memory`.

    Raises:
        InvalidRequestError: One of the two is something else.
    """
    whole = tuple(turns) if isinstance(turns, Iterable) else (turns,)
    if not all(isinstance(turn, Turn) for turn in whole):
        raise InvalidRequestError("A conversation is a sequence of Turns; pass [Turn('user', ...)], or use ask().")
    if not isinstance(memory, DocumentMemory | None):
        raise InvalidRequestError(
            f"memory= is of type {type(memory).__name__}; it takes a DocumentMemory, which read() returns. The layout of "
            "memories (MemoryConfig) is set where the QLLM is made, or as its attribute `memory`."
        )
    return whole


def as_rows(
    input_ids: Any, query_span: Any, attention_mask: Any, *, vocabulary: int, any_span: bool = False
) -> tuple[list[torch.Tensor], list[tuple[int, int] | None]]:
    """Rows without padding, and each row's query span counted without it.

    `any_span` lets spans through that lie outside their row: the published code gives them a meaning.

    Raises:
        InvalidRequestError: Shapes do not fit, a row is empty, padding is not on the left, a token is unknown to a model of
            `vocabulary` tokens, or a span lies outside its row.
    """
    rows = _rows(input_ids, "input_ids must be [n] or [batch, n] token ids with at least one token per row.")
    if any(len(row) == 0 for row in rows) or not rows:
        raise InvalidRequestError("input_ids must hold at least one row, and every row at least one token.")
    spans = _spans(query_span, len(rows))
    if attention_mask is not None:
        masks = [mask != 0 for mask in _rows(attention_mask, "attention_mask must have the shape of input_ids.")]
        if [len(m) for m in masks] != [len(r) for r in rows]:
            raise InvalidRequestError("attention_mask must have the shape of input_ids.")
        for number, mask in enumerate(masks):
            pad = int((~mask).sum())
            if pad == len(mask) or bool((~mask[pad:]).any()):
                raise InvalidRequestError(f"Row {number}: padding must stand on the left and leave at least one token.")
            rows[number] = rows[number][pad:]
            span = spans[number]
            if span is not None:
                spans[number] = (span[0] - pad, span[1] - pad)
    for number, (row, span) in enumerate(zip(rows, spans, strict=True)):
        if int(row.min()) < 0 or int(row.max()) >= vocabulary:
            raise InvalidRequestError(f"Row {number}: token ids must lie between 0 and {vocabulary - 1}.")
        if span is not None and not any_span and not 0 <= span[0] < span[1] <= len(row):
            raise InvalidRequestError(f"Row {number}: query span {span} lies outside its {len(row)} tokens.")
    return rows, spans


def _rows(values: Any, message: str) -> list[torch.Tensor]:
    """Rows of whole numbers."""
    try:
        nested = isinstance(values, torch.Tensor | np.ndarray) or not np.ndim(values[0])
        table = torch.as_tensor(values) if nested else None
        rows = (
            [torch.as_tensor(row) for row in values]
            if table is None
            else list(table[None] if table.ndim == 1 else table)
        )
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise InvalidRequestError(message) from error
    if any(row.ndim != 1 or (len(row) and bool((row != row.long()).any())) for row in rows):
        raise InvalidRequestError(message)
    return [row.long().cpu() for row in rows]


def _spans(query_span: Any, n_rows: int) -> list[tuple[int, int] | None]:
    """One span per row; a single one counts for all."""
    try:
        alone = query_span is None or isinstance(query_span[0], Integral)
        spans = [query_span] * n_rows if alone else list(query_span)
        whole = [None if span is None else (index(span[0]), index(span[1])) for span in spans]
        if any(span is not None and len(span) != 2 for span in spans):
            raise ValueError("not a pair")
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InvalidRequestError(
            f"query_span={query_span!r} is not a pair of token positions (start, end), nor one pair or None per row."
        ) from error
    if len(whole) != n_rows:
        raise InvalidRequestError(f"{len(whole)} query spans for {n_rows} rows; pass one per row.")
    return whole
