"""`QLLMSynthesizer`: whole retrieved nodes read at once, for any query engine with a retriever."""
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_index.core.instrumentation as instrument
from llama_index.core.base.response.schema import RESPONSE_TYPE, PydanticResponse, Response
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.indices import prompt_helper
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, QueryType, TextNode
from llama_index.core.types import RESPONSE_TEXT_TYPE

from qllm_integrations.llama_index.asking import DEFAULT_TEMPLATE, Asker, Sources, asking_llm
from qllm_integrations.llama_index.llm import QLLM
from qllm_integrations.llama_index.query_engine import EMPTY_RESPONSE, empty_stream
from qllm_integrations.llama_index.streaming import LookupAsyncStreamingResponse, LookupStreamingResponse
from qllm_integrations.llama_index.structured import parse

dispatcher = instrument.get_dispatcher(__name__)


class QLLMSynthesizer(BaseSynthesizer):
    """Reads all retrieved nodes at once, whole, under the question; nothing is truncated, packed or refined.

    `source_nodes` of the response are the passages that were looked up in the retrieved nodes, with offsets in the
    original documents; where nothing was looked up, the retrieved nodes themselves.

    Args:
        llm: A `QLLM` (None: `Settings.llm`).
        streaming: Return the answer as a stream.
        output_cls: Return the answer as an instance of this class.
        text_qa_template: Prompt template with `{context_str}` and `{query_str}`.
        system_prompt: Ahead of the nodes.
        options: Further arguments of each call of the model.

    Examples:
        ```python
        from llama_index.core import Document, SummaryIndex
        from qllm_integrations.llama_index import QLLM, QLLMSynthesizer

        text = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 20
        llm = QLLM(model="reader", max_tokens=32)
        index = SummaryIndex.from_documents([Document(text=text)])
        engine = index.as_query_engine(llm=llm, response_synthesizer=QLLMSynthesizer(llm=llm))
        print(engine.query("What is the secret number?"))
        ```
    """

    def __init__(
        self,
        llm: Any = None,
        *,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        system_prompt: str | None = None,
        options: dict[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        model, structured = asking_llm(llm)
        # every question brings nodes of its own: nothing to keep
        self._asker = Asker(
            model, "query_aware", template=text_qa_template or DEFAULT_TEMPLATE, system_prompt=system_prompt
        )
        self._options = dict(options or {})
        output_cls = output_cls or structured
        if output_cls is not None:
            self._options["response_schema"] = output_cls.model_json_schema()
        super().__init__(
            llm=model,
            callback_manager=callback_manager,
            **_helpers(model),
            streaming=streaming,
            output_cls=output_cls,
        )

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._asker.template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._asker.template = prompts.get("text_qa_template", self._asker.template)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer a question about bare texts."""
        nodes, options = _nodes(text_chunks), {**self._options, **response_kwargs}
        if self._streaming:
            return self._asker.stream(query_str, nodes, Sources(), **options)
        response = self._asker.ask(query_str, nodes, **options)
        return parse(response, self._output_cls) if self._output_cls else response.message.content or ""

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """As `get_response`, without blocking the event loop."""
        nodes, options = _nodes(text_chunks), {**self._options, **response_kwargs}
        if self._streaming:
            return await self._asker.astream(query_str, nodes, Sources(), **options)
        response = await self._asker.aask(query_str, nodes, **options)
        return parse(response, self._output_cls) if self._output_cls else response.message.content or ""

    # `synthesize` is taken over whole: the base class would put metadata into the texts, which shifts every offset

    @dispatcher.span
    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer a question about retrieved nodes."""
        with self._told(query) as (text, tell):
            nodes, sources, options = self._taken(nodes, response_kwargs)
            wholes = [found.node for found in nodes]
            if not nodes:
                return tell(self._empty(LookupStreamingResponse((text for text in [EMPTY_RESPONSE]), sources)))
            if self._streaming:
                stream = self._asker.stream(text, wholes, sources, **options)
                return tell(LookupStreamingResponse(_then(stream, sources, nodes, additional_source_nodes), sources))
            answer = self._asker.ask(text, wholes, **options)
            return tell(self._whole(answer, wholes, nodes, additional_source_nodes))

    @dispatcher.span
    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """As `synthesize`, without blocking the event loop."""
        with self._told(query) as (text, tell):
            nodes, sources, options = self._taken(nodes, response_kwargs)
            wholes = [found.node for found in nodes]
            if not nodes:
                return tell(self._empty(LookupAsyncStreamingResponse(empty_stream(), sources)))
            if self._streaming:
                stream = await self._asker.astream(text, wholes, sources, **options)
                told = _athen(stream, sources, nodes, additional_source_nodes)
                return tell(LookupAsyncStreamingResponse(told, sources))
            answer = await self._asker.aask(text, wholes, **options)
            return tell(self._whole(answer, wholes, nodes, additional_source_nodes))

    @contextmanager
    def _told(self, query: QueryType) -> Iterator[tuple[str, Callable[[RESPONSE_TYPE], RESPONSE_TYPE]]]:
        """The question's text, and a function that tells of the response and hands it on."""
        dispatcher.event(SynthesizeStartEvent(query=query))
        text = query.query_str if isinstance(query, QueryBundle) else query
        with self._callback_manager.event(CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: text}) as event:

            def tell(response: RESPONSE_TYPE) -> RESPONSE_TYPE:
                event.on_end(payload={EventPayload.RESPONSE: response})
                dispatcher.event(SynthesizeEndEvent(query=query, response=response))
                return response

            yield text, tell

    def _taken(
        self, nodes: Sequence[NodeWithScore], response_kwargs: dict[str, Any]
    ) -> tuple[list[NodeWithScore], Sources, dict[str, Any]]:
        solid = [found for found in nodes if found.node.get_content(metadata_mode=MetadataMode.NONE).strip()]
        return solid, Sources(), {**self._options, **response_kwargs}

    def _empty(self, stream: RESPONSE_TYPE) -> RESPONSE_TYPE:
        return stream if self._streaming else Response(EMPTY_RESPONSE)

    def _whole(
        self, answer: Any, wholes: list[Any], nodes: list[NodeWithScore], additional: Sequence[NodeWithScore] | None
    ) -> RESPONSE_TYPE:
        sources = Sources()
        sources.fill(answer, wholes)
        _complete(sources, nodes, additional)
        if self._output_cls is not None:
            return PydanticResponse(
                parse(answer, self._output_cls), source_nodes=sources.nodes, metadata=sources.metadata
            )
        return Response(answer.message.content or "", source_nodes=sources.nodes, metadata=sources.metadata)


def _helpers(llm: QLLM) -> dict[str, Any]:
    """Prompt helpers with the model's own tokenizer; the default ones would load another model's."""
    kinds = {"prompt_helper": "PromptHelper", "chat_prompt_helper": "ChatPromptHelper"}
    taken = inspect.signature(BaseSynthesizer.__init__).parameters  # older cores have no chat_prompt_helper
    return {
        name: getattr(prompt_helper, kind).from_llm_metadata(llm.metadata, tokenizer=llm.tokenizer_fn)
        for name, kind in kinds.items()
        if name in taken
    }


def _nodes(texts: Sequence[str]) -> list[TextNode]:
    return [TextNode(text=text) for text in texts if text.strip()]


def _complete(sources: Sources, nodes: Sequence[NodeWithScore], additional: Sequence[NodeWithScore] | None) -> None:
    if not sources.nodes:
        sources.nodes.extend(nodes)
    sources.nodes.extend(additional or ())
    sources.metadata.update({found.node.node_id: found.node.metadata for found in sources.nodes})


def _then(
    stream: Any, sources: Sources, nodes: Sequence[NodeWithScore], additional: Sequence[NodeWithScore] | None
) -> Any:
    yield from stream
    _complete(sources, nodes, additional)


async def _athen(
    stream: Any, sources: Sources, nodes: Sequence[NodeWithScore], additional: Sequence[NodeWithScore] | None
) -> Any:
    try:
        async for text in stream:
            yield text
    finally:
        await stream.aclose()
    _complete(sources, nodes, additional)
