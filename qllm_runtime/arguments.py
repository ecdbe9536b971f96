"""What callers pass, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qllm_runtime.errors import DocumentError, InvalidConfigError, InvalidRequestError
from qllm_runtime.types import Document, Sampling


def as_documents(documents: str | Document | Sequence[str | Document]) -> tuple[Document, ...]:
    """Documents from whatever stands for them.

    Raises:
        DocumentError: There is none, one is empty, or something is no document.
    """
    items = [documents] if isinstance(documents, str | Document) else list(documents)
    if not items:
        raise DocumentError("No document was given.")
    whole = []
    for number, item in enumerate(items):
        if not isinstance(item, str | Document):
            raise DocumentError(f"Document {number} is a {type(item).__name__}; pass text or a Document.")
        document = Document(item) if isinstance(item, str) else item
        if not document.text.strip():
            raise DocumentError(f"Document {number} ({document.title or 'untitled'}) has no text.")
        whole.append(document)
    return tuple(whole)


def as_sampling(sampling: Sampling | None, fields: Mapping[str, Any]) -> Sampling:
    """Sampling settings with single fields replaced.

    Raises:
        InvalidConfigError: A field has an unknown name.
    """
    unknown = set(fields) - set(Sampling.__dataclass_fields__)
    if unknown:
        raise InvalidConfigError(
            f"Unknown sampling setting {sorted(unknown)}; known: {sorted(Sampling.__dataclass_fields__)}."
        )
    if isinstance(fields.get("stop"), str):
        fields = {**fields, "stop": (fields["stop"],)}
    changes: dict[str, Any] = {k: tuple(v) if k == "stop" else v for k, v in fields.items()}
    return replace(sampling or Sampling(), **changes)


def as_rows(
    input_ids: Any, query_span: Any, attention_mask: torch.Tensor | None, *, any_span: bool = False
) -> tuple[list[torch.Tensor], list[tuple[int, int] | None]]:
    """Rows without padding, and each row's query span counted without it.

    `any_span` lets spans through that lie outside their row: the published code gives them a meaning.

    Raises:
        InvalidRequestError: Shapes do not fit, a row is empty, padding is not on the left, or a span lies outside its row.
    """
    if isinstance(input_ids, torch.Tensor):
        rows = list(input_ids[None] if input_ids.ndim == 1 else input_ids)
        single = input_ids.ndim == 1
    else:
        single = bool(len(input_ids)) and isinstance(input_ids[0], int | np.integer)
        rows = [torch.as_tensor(row, dtype=torch.long) for row in ([input_ids] if single else input_ids)]
    if not rows or any(row.ndim != 1 or len(row) == 0 for row in rows):
        raise InvalidRequestError("input_ids must be [n] or [batch, n] token ids with at least one token per row.")
    rows = [row.long().cpu() for row in rows]
    spans = [query_span] if query_span is None or isinstance(query_span[0], int) else list(query_span)
    if len(spans) == 1 and len(rows) > 1:
        spans = spans * len(rows)
    if len(spans) != len(rows):
        raise InvalidRequestError(f"{len(spans)} query spans for {len(rows)} rows; pass one per row.")
    if attention_mask is not None:
        masks = list((attention_mask[None] if attention_mask.ndim == 1 else attention_mask).bool().cpu())
        if [len(m) for m in masks] != [len(r) for r in rows]:
            raise InvalidRequestError("attention_mask must have the shape of input_ids.")
        for number, mask in enumerate(masks):
            pad = int((~mask).sum())
            if pad == len(mask) or bool((~mask[pad:]).any()):
                raise InvalidRequestError(f"Row {number}: padding must stand on the left and leave at least one token.")
            rows[number] = rows[number][pad:]
            if spans[number] is not None:
                spans[number] = (spans[number][0] - pad, spans[number][1] - pad)
    for number, (row, span) in enumerate(zip(rows, spans, strict=True)):
        if span is not None and not any_span and not 0 <= span[0] < span[1] <= len(row):
            raise InvalidRequestError(f"Row {number}: query span {tuple(span)} lies outside its {len(row)} tokens.")
    return rows, spans
