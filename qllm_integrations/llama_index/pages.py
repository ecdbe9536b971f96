"""The pages (slides, sections) of a file: put together, found again by their ids, exchanged one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.schema import BaseNode, Document, MetadataMode

from qllm_runtime.documents import page_span
from qllm_runtime.errors import DocumentError, InvalidRequestError

#: Metadata of a rejoined document: [label, start offset, id] of each of its pages; older indexes have no ids.
PAGES_KEY = "page_offsets"
#: Between the parts of a rejoined file.
PAGE_SEPARATOR = "\n\n"
_LABEL_KEY = "page_label"


@dataclass(frozen=True)
class Page:
    """A part of a file.

    Attributes:
        label: As the reader numbers it.
        id: Id of the document that the reader made of it, None where an older index did not keep it.
        text: Its text.
    """

    label: str
    id: str | None
    text: str


def join(parts: Sequence[Document]) -> Document:
    """The parts of one file as one document, with the id of the first and the metadata all parts agree on.

    Raises:
        DocumentError: No part has text.
    """
    first = parts[0]
    pages = [_page(part, str(number)) for number, part in enumerate(parts, start=1)]
    if len(parts) == 1 and _LABEL_KEY not in first.metadata:
        _check_text(first, pages)
        return first
    metadata = {
        key: value
        for key, value in first.metadata.items()
        if key != _LABEL_KEY and all(part.metadata.get(key) == value for part in parts)
    }
    return _whole(first, first.id_, metadata, pages)


def pages_of(node: BaseNode) -> list[Page]:
    """The pages of a whole document; none if it was never in parts."""
    entries = node.metadata.get(PAGES_KEY) or ()
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    starts = [int(entry[1]) for entry in entries]
    ends = [start - len(PAGE_SEPARATOR) for start in starts[1:]] + [len(text)]
    return [
        Page(str(entry[0]), str(entry[2]) if len(entry) > 2 else None, text[start:end])
        for entry, start, end in zip(entries, starts, ends, strict=False)
    ]


def renewed(known: BaseNode, given: Sequence[Document], *, by_id: bool = False) -> Document:
    """A whole document after some or all of its file's parts were given anew; it keeps its id.

    Parts that are known by their ids take the place of what they were. Where all are given, or all ids are new (most
    readers give new ones each time), they are the whole file.

    Args:
        known: The node of the whole document.
        given: Parts of the same file.
        by_id: Never take parts with new ids for the whole of a file that has several.

    Raises:
        InvalidRequestError: They may be some parts of the file only, and which cannot be told.
        DocumentError: No text is left.
    """
    assert known.ref_doc_id is not None
    pages = pages_of(known)
    known_ids, given_ids = Counter(page.id for page in pages if page.id), Counter(part.id_ for part in given)
    if len(pages) > 1 and not known_ids <= given_ids and known_ids & given_ids:
        if given_ids <= known_ids and all(known_ids[part] == 1 for part in given_ids):
            return _spliced(known, pages, given)
        raise _unclear(known, given)
    labels = [page.label for page in pages]
    given_labels = [_page(part, str(number)).label for number, part in enumerate(given, start=1)]
    covered = set(labels) <= set(given_labels)
    # the id of the whole is also that of its first part; and no reader begins a file in its middle
    partial = known.ref_doc_id in given_ids or (labels[:1] != given_labels[:1] and set(given_labels) <= set(labels))
    if len(pages) > 1 and not known_ids & given_ids and (by_id or (partial and not covered)):
        raise _unclear(known, given)
    whole = join(given)
    return whole.model_copy(update={"id_": known.ref_doc_id}) if whole.id_ != known.ref_doc_id else whole


def without(known: BaseNode, part: str) -> Document:
    """A whole document without one of its parts.

    Raises:
        InvalidRequestError: Several of its parts have this id.
        DocumentError: No text is left.
    """
    assert known.ref_doc_id is not None
    pages = pages_of(known)
    left = [page for page in pages if page.id != part]
    if len(left) != len(pages) - 1:
        raise InvalidRequestError(
            f"Several parts of {_name(known)} have the id {part!r}; pass all its parts to refresh_ref_docs instead."
        )
    return _whole(known, known.ref_doc_id, known.metadata, left)


def page_label(pages: Sequence[Sequence[Any]] | None, start: int, end: int) -> str | None:
    """Label of the page a passage stands on, "3-4" when it runs over a page break."""
    if not pages:
        return None
    first, last = page_span([int(page[1]) for page in pages], start, end)
    label = str(pages[first - 1][0])
    return label if first == last else f"{label}-{pages[last - 1][0]}"


def _page(part: Document, label: str) -> Page:
    return Page(str(part.metadata.get(_LABEL_KEY, label)), part.id_, part.get_content(metadata_mode=MetadataMode.NONE))


def _spliced(known: BaseNode, pages: Sequence[Page], given: Sequence[Document]) -> Document:
    assert known.ref_doc_id is not None
    new = {part.id_: part for part in given}
    after = [page if page.id not in new else _page(new[page.id], page.label) for page in pages]
    metadata = {
        key: value
        for key, value in known.metadata.items()
        if all(part.metadata.get(key, value) == value for part in given)  # what a part does not say stays
    }
    return _whole(known, known.ref_doc_id, metadata, after)


def _whole(like: BaseNode, id_: str, metadata: Mapping[str, Any], pages: Sequence[Page]) -> Document:
    _check_text(like, pages)
    offsets, position = [], 0
    for page in pages:
        offsets.append([page.label, position, page.id] if page.id is not None else [page.label, position])
        position += len(page.text) + len(PAGE_SEPARATOR)
    return Document(
        id_=id_,
        text=PAGE_SEPARATOR.join(page.text for page in pages),
        metadata={**metadata, PAGES_KEY: offsets},
        excluded_llm_metadata_keys=list(dict.fromkeys([*like.excluded_llm_metadata_keys, PAGES_KEY])),
        excluded_embed_metadata_keys=list(dict.fromkeys([*like.excluded_embed_metadata_keys, PAGES_KEY])),
    )


def _check_text(like: BaseNode, pages: Sequence[Page]) -> None:
    if not any(page.text.strip() for page in pages):
        raise DocumentError(
            f"The document {_name(like)} has no text (an image, or scanned pages?); leave it out or run OCR on it first."
        )


def _unclear(known: BaseNode, given: Sequence[Document]) -> InvalidRequestError:
    ids = ", ".join(repr(part.id_) for part in given)
    return InvalidRequestError(
        f"{_name(known)} was put together from {len(pages_of(known))} parts, and {ids} cannot be told to be all of them "
        "or certain ones. Pass all its parts to refresh_ref_docs; or, if the others are gone, call "
        f"delete_ref_doc({known.ref_doc_id!r}) and insert it anew."
    )


def _name(like: BaseNode) -> str:
    return repr(like.metadata.get("file_name") or like.metadata.get("file_path") or like.ref_doc_id or like.node_id)
