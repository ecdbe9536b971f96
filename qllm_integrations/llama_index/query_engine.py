"""Answering questions of an index of whole documents."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE, PydanticResponse, Response
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode, MetadataMode, QueryBundle

from qllm_integrations.aio import run_in_thread
from qllm_integrations.llama_index.asking import LOOKUP_TOKENS, Asker, Sources
from qllm_integrations.llama_index.streaming import LookupAsyncStreamingResponse, LookupStreamingResponse
from qllm_integrations.llama_index.structured import parse
from qllm_runtime.errors import InvalidRequestError

EMPTY_RESPONSE = "Empty Response"
_WHOLE = (ResponseMode.COMPACT, ResponseMode.SIMPLE_SUMMARIZE, ResponseMode.TREE_SUMMARIZE)
_SUPPORTED = (
    *_WHOLE,
    ResponseMode.ACCUMULATE,
    ResponseMode.GENERATION,
    ResponseMode.NO_TEXT,
    ResponseMode.CONTEXT_ONLY,
)


class WholeDocumentQueryEngine(BaseQueryEngine):
    """Answers from whole documents; `source_nodes` are the passages that were looked up.

    Response modes: "compact" (the default), "simple_summarize" and "tree_summarize" are the same here, one answer
    from all documents at once, since nothing has to be split. "accumulate" asks each document by itself. "no_text"
    returns the passages only, "context_only" their text, "generation" answers without the documents. The others raise
    `InvalidRequestError`.

    Args:
        asker: Puts questions to the model.
        nodes: Gives the whole nodes of the index.
        streaming: Return the answer as a stream.
        output_cls: Return the answer as an instance of this class (`PydanticResponse`); streamed as its JSON.
        response_mode: See above.
        similarity_top_k: At most this many source nodes.
        options: Further arguments of each call of the model, e.g. `{"max_tokens": 64}`.

    Examples:
        ```python
        from llama_index.core import Document
        from qllm_integrations.llama_index import QLLM, WholeDocumentIndex

        text = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 20
        index = WholeDocumentIndex.from_documents([Document(text=text)], llm=QLLM(model="reader", max_tokens=32))
        response = index.as_query_engine(streaming=True).query("What is the secret number?")
        response.print_response_stream()
        print([(found.score, found.node.start_char_idx) for found in response.source_nodes])
        ```
    """

    def __init__(
        self,
        asker: Asker,
        nodes: Callable[[], Sequence[BaseNode]],
        *,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        response_mode: ResponseMode | str = ResponseMode.COMPACT,
        similarity_top_k: int | None = None,
        options: dict[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._mode = response_mode_of(response_mode)
        whole = (*_WHOLE, ResponseMode.GENERATION)
        if streaming and self._mode not in whole:
            raise InvalidRequestError(f"response_mode={self._mode.value!r} cannot be streamed; leave streaming out.")
        if output_cls is not None and self._mode not in whole:
            raise InvalidRequestError(
                f"response_mode={self._mode.value!r} gives no single answer for output_cls; use 'compact'."
            )
        self._asker = asker
        self._nodes = nodes
        self._streaming = streaming
        self._output_cls = output_cls
        self._top = similarity_top_k
        self._options = dict(options or {})
        if output_cls is not None:
            self._options["response_schema"] = output_cls.model_json_schema()
        if self._mode in (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY):
            self._options.setdefault("max_tokens", LOOKUP_TOKENS)
        super().__init__(callback_manager)

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._asker.template}

    def _get_prompt_modules(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._asker.template = prompts.get("text_qa_template", self._asker.template)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            response = self._respond(query_bundle.query_str, self._asked())
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            nodes = await run_in_thread(lambda cancel: self._asked())  # a document store may be remote
            response = await self._arespond(query_bundle.query_str, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _asked(self) -> list[BaseNode]:
        return [] if self._mode is ResponseMode.GENERATION else list(self._nodes())

    def _respond(self, query: str, nodes: list[BaseNode]) -> RESPONSE_TYPE:
        sources = Sources()
        if not nodes and self._mode is not ResponseMode.GENERATION:
            return (
                LookupStreamingResponse((text for text in [EMPTY_RESPONSE]), sources)
                if self._streaming
                else Response(EMPTY_RESPONSE)
            )
        if self._streaming:
            return LookupStreamingResponse(
                self._asker.stream(query, nodes, sources, top=self._top, **self._options), sources
            )
        if self._mode is ResponseMode.ACCUMULATE:
            return self._accumulated([(node, self._asker.ask(query, [node], **self._options)) for node in nodes])
        return self._response(self._asker.ask(query, nodes, **self._options), nodes, sources)

    async def _arespond(self, query: str, nodes: list[BaseNode]) -> RESPONSE_TYPE:
        sources = Sources()
        if not nodes and self._mode is not ResponseMode.GENERATION:
            return (
                LookupAsyncStreamingResponse(empty_stream(), sources) if self._streaming else Response(EMPTY_RESPONSE)
            )
        if self._streaming:
            text = await self._asker.astream(query, nodes, sources, top=self._top, **self._options)
            return LookupAsyncStreamingResponse(text, sources)
        if self._mode is ResponseMode.ACCUMULATE:
            return self._accumulated([(node, await self._asker.aask(query, [node], **self._options)) for node in nodes])
        return self._response(await self._asker.aask(query, nodes, **self._options), nodes, sources)

    def _response(self, answer: ChatResponse, nodes: list[BaseNode], sources: Sources) -> RESPONSE_TYPE:
        sources.fill(answer, nodes, self._top)
        if self._output_cls is not None:
            return PydanticResponse(
                parse(answer, self._output_cls), source_nodes=sources.nodes, metadata=sources.metadata
            )
        text = answer.message.content or ""
        if self._mode is ResponseMode.NO_TEXT:
            text = ""
        elif self._mode is ResponseMode.CONTEXT_ONLY:
            text = "\n\n".join(found.node.get_content(metadata_mode=MetadataMode.NONE) for found in sources.nodes)
        return Response(text, source_nodes=sources.nodes, metadata=sources.metadata)

    def _accumulated(self, answers: list[tuple[BaseNode, ChatResponse]]) -> Response:
        sources = Sources()
        texts, told = [], []
        for number, (node, answer) in enumerate(answers, start=1):
            texts.append(f"Response {number}: {answer.message.content or ''}")
            sources.fill(answer, [node], self._top)
            told.append(sources.metadata["qllm"])
        sources.metadata["qllm"] = told
        return Response("\n---------------------\n".join(texts), source_nodes=sources.nodes, metadata=sources.metadata)


def response_mode_of(mode: ResponseMode | str) -> ResponseMode:
    """The response mode of this name.

    Raises:
        InvalidRequestError: There is none, or it makes no sense for whole documents.
    """
    names = ", ".join(repr(supported.value) for supported in _SUPPORTED)
    try:
        found = ResponseMode(mode)
    except ValueError:
        raise InvalidRequestError(f"There is no response_mode {mode!r}; whole documents support {names}.") from None
    if found not in _SUPPORTED:
        raise InvalidRequestError(
            f"response_mode={found.value!r} works through pieces of a split text; a whole document is read at "
            f"once. Use one of {names}."
        )
    return found


async def empty_stream() -> AsyncGenerator[str, None]:
    """The answer of an index without documents."""
    yield EMPTY_RESPONSE
