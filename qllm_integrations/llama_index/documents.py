"""Whole documents as LlamaIndex nodes: pages rejoined, metadata beside the text, offsets that stay true."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

import bisect
import uuid
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import CitableBlock
from llama_index.core.schema import (
    BaseNode,
    Document,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
    TransformComponent,
)

from qllm_runtime.errors import DocumentError, InvalidRequestError
from qllm_runtime.types import Document as EngineDocument

#: Metadata of a rejoined document: (label, start offset) of each of its pages.
PAGES_KEY = "page_offsets"
#: Between the parts of a rejoined file.
PAGE_SEPARATOR = "\n\n"
# a file that was merely read is not a changed file
_VOLATILE = ("last_accessed_date",)
_NAMESPACE = uuid.UUID("5f0c9d1e-3a52-4a3e-9a7e-6f1d1c0b7a11")


def rejoin(documents: Sequence[Document]) -> list[tuple[Document, list[int]]]:
    """Put the parts of each file together again, in order of appearance.

    Readers hand out one document per page (PDF), slide or section; parts of one file share `metadata["file_path"]`.
    The whole keeps the id of its first part and the metadata all parts agree on.

    Returns:
        Each document with the positions of its parts in `documents`.

    Raises:
        DocumentError: A document without text.
    """
    groups: dict[str, list[int]] = {}
    for position, document in enumerate(documents):
        if not isinstance(document, Document):
            raise InvalidRequestError(
                f"from_documents takes Documents, got a {type(document).__name__} at position {position}."
            )
        path = document.metadata.get("file_path")
        groups.setdefault(f"path:{path}" if path else f"id:{position}", []).append(position)
    return [(_join([documents[i] for i in positions]), positions) for positions in groups.values()]


def check_ids(documents: Sequence[Document]) -> None:
    """Refuse documents that share an id: only one of them could be kept.

    Raises:
        InvalidRequestError: Two documents have the same id.
    """
    seen: set[str] = set()
    for document in documents:
        if document.id_ in seen:
            raise InvalidRequestError(
                f"Two documents have the id {document.id_!r}; give each an id_ of its own, or leave id_ out."
            )
        seen.add(document.id_)


def _join(parts: list[Document]) -> Document:
    first = parts[0]
    texts = [part.get_content(metadata_mode=MetadataMode.NONE) for part in parts]
    if not any(text.strip() for text in texts):
        name = first.metadata.get("file_name") or first.metadata.get("file_path") or first.id_
        raise DocumentError(
            f"The document {name!r} has no text (an image, or scanned pages?); leave it out or run OCR on it first."
        )
    if len(parts) == 1 and "page_label" not in first.metadata:
        return first
    metadata = {
        key: value
        for key, value in first.metadata.items()
        if key != "page_label" and all(part.metadata.get(key) == value for part in parts)
    }
    offsets, position = [], 0
    for number, (part, text) in enumerate(zip(parts, texts, strict=True), start=1):
        offsets.append([str(part.metadata.get("page_label", number)), position])
        position += len(text) + len(PAGE_SEPARATOR)
    metadata[PAGES_KEY] = offsets
    hidden = list(dict.fromkeys([*first.excluded_llm_metadata_keys, PAGES_KEY]))
    unembedded = list(dict.fromkeys([*first.excluded_embed_metadata_keys, PAGES_KEY]))
    return Document(
        id_=first.id_,
        text=PAGE_SEPARATOR.join(texts),
        metadata=metadata,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=unembedded,
    )


class WholeDocument(TransformComponent):
    """The transformation that does not split: one node per document, with the document as its source."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Wrap documents; nodes that are whole already pass."""
        return [whole_node(_join([node])) if isinstance(node, Document) else node for node in nodes]


def whole_node(document: Document) -> TextNode:
    """The node of a document. Its id depends on the document's only, so an update keeps it."""
    return TextNode(
        id_=str(uuid.uuid5(_NAMESPACE, document.id_)),
        text=document.get_content(metadata_mode=MetadataMode.NONE),
        metadata=dict(document.metadata),
        excluded_llm_metadata_keys=list(document.excluded_llm_metadata_keys),
        excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
        relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
    )


def lasting_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata that changes only when the file does; as it reads after a round through JSON."""
    return {key: value for key, value in metadata.items() if key not in _VOLATILE}


def title_of(node: BaseNode) -> str | None:
    """What the model sees ahead of the text."""
    title = node.metadata.get("title") or node.metadata.get("file_name")
    return str(title) if title else None


def engine_document(node: BaseNode) -> EngineDocument:
    """A node or document for the engine: its bare text, without metadata."""
    return EngineDocument(node.get_content(metadata_mode=MetadataMode.NONE), title_of(node), {"source": _origin(node)})


def engine_documents(documents: Any) -> list[EngineDocument]:
    """What `QLLM.read` takes, for the engine."""
    items = [documents] if isinstance(documents, (str, EngineDocument, BaseNode)) else list(documents)
    if any(isinstance(item, Document) for item in items):
        wholes = iter(rejoin([item for item in items if isinstance(item, Document)]))
        others = [item for item in items if not isinstance(item, Document)]
        items = [*(document for document, _ in wholes), *others]
    result = []
    for item in items:
        if isinstance(item, str):
            result.append(EngineDocument(item))
        elif isinstance(item, BaseNode):
            result.append(engine_document(item))
        elif isinstance(item, EngineDocument):
            result.append(item)
        else:
            raise InvalidRequestError(
                f"Cannot read a {type(item).__name__}; pass a str, a LlamaIndex document or node, or an engine "
                f"Document."
            )
    return result


def citable_block(node: BaseNode) -> CitableBlock:
    """A node as a document block of a message."""
    return CitableBlock(
        title=title_of(node) or "", source=_origin(node), content=node.get_content(metadata_mode=MetadataMode.NONE)
    )


def passage(node: BaseNode, start: int, end: int, score: float) -> NodeWithScore:
    """A passage of a node as a source: `text == document text[start_char_idx:end_char_idx]`.

    Offsets count in the original document when the node knows where it stands in it, else in the node's own text.
    """
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    base = getattr(node, "start_char_idx", None) or 0
    origin = node.ref_doc_id or node.node_id
    metadata = {key: value for key, value in node.metadata.items() if key != PAGES_KEY}
    label = page_label(node.metadata.get(PAGES_KEY), start, end)
    if label is not None:
        metadata["page_label"] = label
    source = node.source_node or RelatedNodeInfo(node_id=node.node_id)
    found = TextNode(
        id_=f"{origin}:{base + start}-{base + end}",
        text=text[start:end],
        start_char_idx=base + start,
        end_char_idx=base + end,
        metadata=metadata,
        excluded_llm_metadata_keys=list(node.excluded_llm_metadata_keys),
        excluded_embed_metadata_keys=list(node.excluded_embed_metadata_keys),
        relationships={NodeRelationship.SOURCE: source, NodeRelationship.PARENT: node.as_related_node_info()},
    )
    return NodeWithScore(node=found, score=score)


def page_label(pages: Sequence[Sequence[Any]] | None, start: int, end: int) -> str | None:
    """Label of the page a passage stands on, "3-4" when it runs over a page break."""
    if not pages:
        return None
    starts = [int(page[1]) for page in pages]
    first = max(0, bisect.bisect_right(starts, start) - 1)
    last = max(first, bisect.bisect_left(starts, end) - 1)
    return str(pages[first][0]) if first == last else f"{pages[first][0]}-{pages[last][0]}"


def _origin(node: BaseNode) -> str:
    return str(node.metadata.get("file_path") or node.ref_doc_id or node.node_id)
