"""Retrieval by reading: the passages the model looks up for a question."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle

from qllm_integrations.aio import run_in_thread
from qllm_integrations.llama_index.asking import LOOKUP_TOKENS, Asker, Sources


class LookupRetriever(BaseRetriever):
    """Returns the passages that the model's attention falls on while it begins to answer.

    No embeddings, no chunks: a passage is wherever the model looked, as a node with `start_char_idx` and
    `end_char_idx` in the whole document and the share of the attention as its score.

    Args:
        asker: Puts the question to the model.
        nodes: Gives the whole nodes of the index.
        similarity_top_k: At most this many passages (None: all that were looked up).
        max_tokens: Tokens of an answer to look up passages for.

    Examples:
        ```python
        from llama_index.core import Document
        from qllm_integrations.llama_index import QLLM, WholeDocumentIndex

        text = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 20
        index = WholeDocumentIndex.from_documents([Document(text=text)], llm=QLLM(model="reader"))
        for found in index.as_retriever(similarity_top_k=2).retrieve("What is the secret number?"):
            print(found.score, found.node.start_char_idx, found.node.end_char_idx)
        ```
    """

    def __init__(
        self,
        asker: Asker,
        nodes: Callable[[], Sequence[BaseNode]],
        *,
        similarity_top_k: int | None = None,
        max_tokens: int = LOOKUP_TOKENS,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        self._asker = asker
        self._nodes = nodes
        self._top = similarity_top_k
        self._max_tokens = max_tokens
        super().__init__(callback_manager=callback_manager, verbose=verbose)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        nodes, sources = self._nodes(), Sources()
        if nodes:
            sources.fill(self._asker.ask(query_bundle.query_str, nodes, max_tokens=self._max_tokens), nodes, self._top)
        return sources.nodes

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        nodes, sources = await run_in_thread(lambda cancel: self._nodes()), Sources()
        if nodes:
            response = await self._asker.aask(query_bundle.query_str, nodes, max_tokens=self._max_tokens)
            sources.fill(response, nodes, self._top)
        return sources.nodes
