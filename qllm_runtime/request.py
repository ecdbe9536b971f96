"""A request, and what its prompt is made of: turns, documents, question."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qllm_runtime.cache import MemoryCache
from qllm_runtime.config import MemoryConfig
from qllm_runtime.decoding import Sampler
from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.errors import ContextOverflowError, InvalidRequestError
from qllm_runtime.inference import Inference
from qllm_runtime.layout import SEPARATOR
from qllm_runtime.memory.record import LayerLookupHook
from qllm_runtime.prompt import Prompt, build_prompt
from qllm_runtime.types import (
    Cancelled,
    Document,
    Mode,
    Progress,
    QuerySource,
    Sampling,
    Source,
    Turn,
    check_mode,
    never,
)

#: How documents are read when the caller does not say; chosen by measurement (docs/results.md).
DEFAULT_MODE: Mode = "read_once"


@dataclass(frozen=True)
class Request:
    """Everything one answer needs; see `QLLM.chat` for the fields given by the caller.

    Attributes:
        direct: Ask the chat template for an answer without a thought, where what was read allows it.
        reading: What the prompt begins with and was read already, and its memories; `resolve` takes them from `memory`.
        excerpts: Passages of the documents to put after all of them, ahead of the last question.
        on_answer: Gets the prompt and the memories once the answer is written.
    """

    inference: Inference
    tokenizer: Any
    config: MemoryConfig
    turns: tuple[Turn, ...]
    query: str | None
    query_source: QuerySource
    memory: DocumentMemory | None
    sampling: Sampling
    sampler: Sampler
    mode: Mode | None = None
    reread: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    progress: Progress | None = None
    on_lookup: LayerLookupHook | None = None
    reading: tuple[Prompt, MemoryCache] | None = None
    excerpts: tuple[Source, ...] = ()
    on_answer: Callable[[Prompt, MemoryCache], None] | None = None
    direct: bool = False

    @property
    def documents(self) -> tuple[Document, ...]:
        """All documents of the conversation, in order of appearance."""
        return tuple(document for turn in self.turns for document in turn.documents)


def resolve(request: Request) -> Request:
    """The request with all its turns, the question, the mode and what was read before.

    Raises:
        InvalidConfigError: An unknown mode.
    """
    check_mode(request.mode)
    query, source = _query(request)
    memory = request.memory
    if memory is not None:
        request = replace(
            request,
            config=memory.config,
            template_kwargs={**memory.template_kwargs, **(request.template_kwargs or {})},
        )
    mode = request.mode or ("query_aware" if request.config.faithful else DEFAULT_MODE)  # as the published code reads
    return replace(
        request,
        turns=with_memory(request.turns, memory),
        query=query,
        query_source=source,
        mode="read_once" if memory is not None else mode,
        reading=None if memory is None else memory.contents(request.inference),
    )


def with_memory(turns: Sequence[Turn], memory: DocumentMemory | None) -> tuple[Turn, ...]:
    """The whole conversation, with the documents of `memory` in its first user turn and its system text ahead.

    Leading system turns that the memory was not read with follow its documents, ahead of the first question.

    Raises:
        InvalidRequestError: The memory was read with another system text.
    """
    turns = tuple(turns)
    if memory is None:
        return turns
    opening: tuple[Turn, ...] = ()
    n = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    late = tuple(turn.text for turn in turns[:n])
    turns = turns[n:]
    if late and memory.system is not None:
        if memory.system == late[0]:
            late = late[1:]
        elif memory.system == SEPARATOR.join(late):
            late = ()
        else:
            raise InvalidRequestError(
                "The documents were read with another system text; read them with this one, or leave the system turn out."
            )
    if memory.system is not None:
        opening = (Turn("system", (memory.system,)),)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise InvalidRequestError("The conversation has no user turn.")
    user = turns[first]
    user = replace(user, content=(*memory.documents, *late, *user.content))
    return (*opening, *turns[:first], user, *turns[first + 1 :])


def build_request_prompt(request: Request, cancelled: Cancelled = never) -> Prompt:
    """The prompt of a resolved request.

    Raises:
        CancelledError: While texts were being tokenised.
        InvalidRequestError: The tokenizer does not fit the model, or the conversation cannot be laid out.
        ContextOverflowError: A question longer than the local window.
    """
    prompt = build_unchecked_prompt(request, cancelled)
    _check_fits(prompt, request.config, request.inference)
    return prompt


def build_unchecked_prompt(request: Request, cancelled: Cancelled = never) -> Prompt:
    """The prompt of a resolved request, whether or not the model can take it.

    Some templates put things ahead of the documents that were not there when these were read: tools (then described after
    them), whether to think, or the date. The beginning stays as it was read.

    Raises:
        CancelledError: While texts were being tokenised.
        InvalidRequestError: The conversation cannot be laid out.
    """
    assert request.mode is not None
    read = request.reading[0] if request.reading else None
    given = dict(request.template_kwargs or {})
    build = partial(
        build_prompt,
        request.tokenizer,
        _with_excerpts(request.turns, request.excerpts),
        query=request.query,
        mode=request.mode,
        tools=request.tools,
        template_kwargs={"enable_thinking": False, **given} if request.direct else given,
        read=read,
        cancelled=cancelled,
    )
    prompt = build()
    if read is None or prompt.begins_with(read):
        return prompt
    if request.memory is None:  # the reading is this conversation's own
        return prompt.on_top_of(read)
    if request.tools:
        prompt = build(tools_as_text=True)
    if not prompt.begins_with(read) and _opens_with_documents(request, request.memory):
        prompt = prompt.on_top_of(read)
    return prompt


def _opens_with_documents(request: Request, memory: DocumentMemory) -> bool:
    """Whether the turns are such that the documents of `memory` can stand ahead of everything but the system text.

    Raises:
        InvalidRequestError: They were read with other variables of the chat template.
    """
    if dict(request.template_kwargs or {}) != memory.template_kwargs:
        raise InvalidRequestError(
            f"The documents were read with template_kwargs={memory.template_kwargs}, and the chat template writes something "
            "else ahead of them now; read them with these, or leave template_kwargs out."
        )
    first = next(turn for turn in request.turns if turn.role != "system")
    return bool(first.documents)


def _with_excerpts(turns: tuple[Turn, ...], excerpts: Sequence[Source]) -> tuple[Turn, ...]:
    """The conversation with passages as further documents of its last user turn, or of a later turn with documents."""
    if not excerpts:
        return turns
    last = max(i for i, turn in enumerate(turns) if turn.role == "user" or turn.documents)
    further = tuple(Document(source.text, source.title) for source in excerpts)
    return (*turns[:last], replace(turns[last], content=(*turns[last].content, *further)), *turns[last + 1 :])


def _query(request: Request) -> tuple[str | None, QuerySource]:
    if request.query is not None:
        return (request.query, request.query_source) if request.query.strip() else (None, "none")
    last = next((turn for turn in reversed(request.turns) if turn.role == "user"), None)
    if last is None or not last.text.strip():
        return None, "none"
    return last.text, "message"


def _check_fits(prompt: Prompt, config: MemoryConfig, inference: Inference) -> None:
    highest = int(prompt.ids.max(initial=0))
    if highest >= inference.vocabulary:
        raise InvalidRequestError(
            f"The tokenizer gives token {highest}, the model knows {inference.vocabulary}; they do not match."
        )
    check_questions(prompt.query_spans, config)
    trained = inference.trained_length
    if config.policy == "full" and trained and len(prompt.ids) > trained:
        warnings.warn(
            f"policy 'full' reads more than the {trained} tokens that the model was trained for; expect poor answers. The "
            "policies 'qllm' and 'infllm' stay within the trained window.",
            stacklevel=2,
        )


def check_questions(spans: Iterable[tuple[int, int]], config: MemoryConfig) -> None:
    """Refuse questions longer than the local window.

    Args:
        spans: Token spans of the questions.
        config: Layout of the memory.

    Raises:
        ContextOverflowError: One is.
    """
    longest = max((end - start for start, end in spans), default=0)
    if longest > config.n_local and config.policy != "full" and not config.faithful:
        raise ContextOverflowError(
            f"The question has {longest} tokens, the local window n_local={config.n_local}: raise n_local, ask a shorter "
            "question, or pass the long part as a document."
        )
