"""Whole documents as LlamaIndex nodes: pages rejoined, metadata beside the text, offsets that stay true."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

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

from qllm_integrations.llama_index.pages import PAGES_KEY, join, page_label
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Document as EngineDocument

# a file that was merely read is not a changed file
_VOLATILE = ("last_accessed_date",)
_NAMESPACE = uuid.UUID("5f0c9d1e-3a52-4a3e-9a7e-6f1d1c0b7a11")


def by_file(documents: Sequence[Document]) -> list[list[int]]:
    """Positions of the documents that are parts of one file, in order of appearance.

    Readers hand out one document per page (PDF), slide or section; parts of one file share `metadata["file_path"]`.

    Raises:
        InvalidRequestError: Something else than documents.
    """
    groups: dict[str, list[int]] = {}
    for position, document in enumerate(documents):
        if not isinstance(document, Document):
            raise InvalidRequestError(
                f"from_documents takes Documents, got a {type(document).__name__} at position {position}."
            )
        path = document.metadata.get("file_path")
        groups.setdefault(f"path:{path}" if path else f"id:{position}", []).append(position)
    return list(groups.values())


def rejoin(documents: Sequence[Document]) -> list[Document]:
    """Put the parts of each file together again, in order of appearance.

    The whole keeps the id of its first part and the metadata all parts agree on.

    Raises:
        DocumentError: A document without text.
    """
    return [join([documents[i] for i in positions]) for positions in by_file(documents)]


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


class WholeDocument(TransformComponent):
    """The transformation that does not split: one node per document, with the document as its source."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Wrap documents; nodes that are whole already pass."""
        return [whole_node(join([node])) if isinstance(node, Document) else node for node in nodes]


def whole_node(document: Document) -> TextNode:
    """The node of a document. Its id depends on the document's only, so an update keeps it."""
    return TextNode(
        id_=_node_id(document.id_),
        text=document.get_content(metadata_mode=MetadataMode.NONE),
        metadata=dict(document.metadata),
        excluded_llm_metadata_keys=list(document.excluded_llm_metadata_keys),
        excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
        relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
    )


def is_whole(node: BaseNode) -> bool:
    """Whether this is the node of a whole document, as `whole_node` makes it."""
    return node.ref_doc_id is not None and node.node_id == _node_id(node.ref_doc_id)


def _node_id(ref_doc_id: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, ref_doc_id))


def lasting_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata that changes only when the file does; as it reads after a round through JSON."""
    lasting = {key: value for key, value in metadata.items() if key not in _VOLATILE}
    if PAGES_KEY in lasting:  # labels and offsets: readers give the pages new ids each time
        lasting[PAGES_KEY] = [list(page[:2]) for page in lasting[PAGES_KEY]]
    return lasting


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
    places = [place for place, item in enumerate(items) if isinstance(item, Document)]
    parts = [items[place] for place in places]
    wholes = {places[group[0]]: join([parts[i] for i in group]) for group in by_file(parts)}
    # a file stands where its first part does
    items = [wholes.get(place, item) for place, item in enumerate(items) if place in wholes or place not in places]
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

    Offsets count in the original document when the node is a slice of it and knows which, else in the node's own text;
    the passage's id says in which: it begins with the id of the document or of the node.
    """
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    first, last = getattr(node, "start_char_idx", None), getattr(node, "end_char_idx", None)
    base, origin = 0, node.node_id
    # parsers that write a text of their own, and postprocessors that replace it, leave other offsets or none
    if first is not None and last is not None and last - first == len(text):
        base, origin = first, node.ref_doc_id or node.node_id
    elif is_whole(node):
        origin = node.ref_doc_id
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


def _origin(node: BaseNode) -> str:
    return str(node.metadata.get("file_path") or node.ref_doc_id or node.node_id)
