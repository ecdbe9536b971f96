"""`QLLM`: ask questions of whole documents."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from transformers import PreTrainedModel

from qllm_runtime import answering, saving
from qllm_runtime.arguments import DocumentLike, Documents, as_documents, as_rows, as_turns, conversation
from qllm_runtime.config import MemoryConfig
from qllm_runtime.decoding import Sampler, check_sampling
from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.errors import ClosedError, InvalidConfigError, InvalidRequestError
from qllm_runtime.grammar import GrammarProcessor
from qllm_runtime.inference import Inference
from qllm_runtime.loading import LoadedModel, load
from qllm_runtime.options import AskOptions, ChatOptions, SamplingOptions, split
from qllm_runtime.prompt import build_reading
from qllm_runtime.reasoning import after_thoughts, lacks_room
from qllm_runtime.request import Request, build_unchecked_prompt, resolve
from qllm_runtime.rereading import serve_request
from qllm_runtime.rotary import short_length
from qllm_runtime.types import Answer, Cancelled, Piece, Progress, QuerySource, Turn, never
from qllm_runtime.worker import stream

_UNBOUNDED = 4 * 1024 * 1024


class QLLM:
    """A language model that reads whole documents through a query-aware block memory (Q-LLM, arXiv 2406.07528).

    Ways of working with documents:

    * `query_aware`: the question is put ahead of the documents as well, and they are read for it (the paper's layout).
    * `read_once`: the documents are read without knowing the question (`read`), and any number of questions follow; the
      lookup is routed anew for each.

    Either way the passages behind a draft of the answer are read again, next to the question, before the answer is written;
    `reread=False` leaves that out.

    Args:
        model: A decoder-only model of transformers that is loaded already.
        tokenizer: Its fast tokenizer; without one only `generate` works.
        memory: Layout and lookup; sizes that are not given fit the model's own context window.
        name: Reported as the model's name.

    Raises:
        UnsupportedModelError: On first use, when the architecture cannot be served.

    Example:
        ```python
        from qllm_runtime import QLLM

        llm = QLLM.from_pretrained("reader")
        answer = llm.ask("What is the pass key?", documents="It rained. The pass key is 71432. It rained again.")
        print(answer.text)
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        memory: MemoryConfig | None = None,
        *,
        name: str | None = None,
    ) -> None:
        label = name or getattr(model, "name_or_path", "") or type(model).__name__
        self._init(LoadedModel(label, tokenizer, Inference.of(model)), memory)

    def _init(self, loaded: LoadedModel, memory: MemoryConfig | None) -> None:
        self._loaded: LoadedModel | None = loaded
        self.name = loaded.name
        config = loaded.inference.model.config.get_text_config()
        self._trained_length = loaded.inference.trained_length or 4096
        self._fitting_length = int(min(self._trained_length, short_length(config)))
        self.memory = memory or MemoryConfig()

    @property
    def memory(self) -> MemoryConfig:
        """Layout and lookup of the next readings and requests; sizes that were not given fit the model.

        Raises:
            InvalidConfigError: When set: a window, or initial tokens, longer than the model was trained for.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: MemoryConfig) -> None:
        memory = memory.fitted(self._fitting_length)
        for name in () if memory.faithful or memory.policy == "full" else ("n_local", "n_init"):
            if getattr(memory, name) > self._trained_length:
                raise InvalidConfigError(
                    f"{name}={getattr(memory, name)} exceeds the {self._trained_length} tokens that {self.name!r} was "
                    f"trained for; lower {name}."
                )
        self._memory = memory

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "reader",
        *,
        revision: str | None = None,
        memory: MemoryConfig | None = None,
        device: str = "auto",
        dtype: str = "auto",
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model by name, path or hub id; weights that are loaded already are shared.

        Args:
            model, revision, device, dtype, token, trust_remote_code: See `loading.load`.
            memory: Layout and lookup; sizes that are not given fit the model's own context window.

        Raises:
            ModelNotFoundError, UnsupportedModelError, OutOfMemoryError: As `loading.load`.
            InvalidConfigError: An unknown device or dtype, or a window longer than the model was trained for.
        """
        loaded = load(
            model, revision=revision, device=device, dtype=dtype, token=token, trust_remote_code=trust_remote_code
        )
        llm = cls.__new__(cls)
        llm._init(loaded, memory)
        llm.name = os.fspath(model)
        return llm

    # ------------------------------------------------------------------ facts

    @property
    def _inference(self) -> Inference:
        if self._loaded is None:
            raise ClosedError(f"The model {self.name!r} was closed; create it again.")
        return self._loaded.inference

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; outside a request it is exactly as it was loaded.

        While a request is under way, calls of it by anybody else raise InvalidRequestError.
        """
        return self._inference.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return None if self._loaded is None else self._loaded.tokenizer

    @property
    def context_window(self) -> int:
        """Tokens one may ask of: the trained length for `full` attention, 4 Mi for policies with constant attention cost."""
        return self._trained_length if self.memory.policy == "full" else _UNBOUNDED

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself, without special tokens."""
        return len(self._need_tokenizer()(text, add_special_tokens=False, verbose=False).input_ids)

    def count_prompt_tokens(
        self,
        turns: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        memory: DocumentMemory | None = None,
    ) -> int:
        """Tokens of a whole conversation as the model would read it (read_once layout), documents and tools included."""
        options: ChatOptions = {"mode": "read_once", "tools": tools, "template_kwargs": template_kwargs}
        request, _ = self._request(turns, "", "none", memory, options)
        return len(build_unchecked_prompt(resolve(request)).ids)

    def _need_tokenizer(self) -> Any:
        if self._loaded is None or self._loaded.tokenizer is None:
            _ = self._inference
            raise InvalidConfigError("This QLLM has no tokenizer; pass one, or use generate() with token ids.")
        return self._loaded.tokenizer

    # ------------------------------------------------------------------ documents

    def read(
        self,
        documents: DocumentLike | Sequence[DocumentLike],
        *,
        system: str | None = None,
        after: DocumentMemory | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> DocumentMemory:
        """Read documents once, to ask of them many times.

        Args:
            documents: One or several: texts, `Document`s, or `Path`s of files and folders.
            system: System text ahead of them.
            after: Continue this memory instead of starting anew; its documents come first and it stays as it was, with its
                system text, template variables and layout.
            template_kwargs: Further variables for the chat template.
            progress: Called with (tokens read, tokens in all).
            cancel: Set it to stop within one chunk.

        Raises:
            DocumentError: No document, one without text, or a file that cannot be read.
            InvalidRequestError: `after` was read with another system text or other template variables.
            CancelledError: `cancel` was set.
            OutOfMemoryError: The message names the setting to lower.
        """
        inference = self._inference
        whole = as_documents(documents)
        config, variables = self.memory, dict(template_kwargs or {})
        if after is not None:
            if system not in (None, after.system) or (variables and variables != after.template_kwargs):
                raise InvalidRequestError(
                    "What is to be continued was read with another system text or other template_kwargs; leave them out, or "
                    "read all documents anew."
                )
            whole = (*after.documents, *whole)
            system, config, variables = after.system, after.config, after.template_kwargs
        cancelled = never if cancel is None else cancel.is_set
        reading = None if after is None else after.contents(inference)
        prompt = build_reading(
            self._need_tokenizer(),
            whole,
            system=system,
            template_kwargs=variables,
            read=reading[0] if reading else None,
            cancelled=cancelled,
        )
        with inference.request(cancelled):
            cache, known = answering.resume_reading(inference, config, prompt, reading)
            answering.read_tokens(inference, cache, prompt, (known, len(prompt.ids)), config, progress, cancelled)
        return DocumentMemory(whole, system, prompt, cache, inference, config, variables)

    def load_memory(
        self, path: str | os.PathLike[str], *, progress: Progress | None = None, cancel: threading.Event | None = None
    ) -> DocumentMemory:
        """Load what `DocumentMemory.save` wrote; nothing is read again.

        Args:
            path: The folder.
            progress: Called with (layers loaded, layers in all).
            cancel: Set it to stop before the next layer.

        Raises:
            SavedReadingError: No reading, a damaged one, or one by another model or chat template.
            CancelledError: `cancel` was set.
            OutOfMemoryError: The message names the setting to lower.
        """
        cancelled = never if cancel is None else cancel.is_set
        return saving.load(Path(path), self._need_tokenizer(), self._inference, progress, cancelled)

    # ------------------------------------------------------------------ questions

    def ask(
        self,
        question: str,
        documents: Documents | None = None,
        *,
        system: str | None = None,
        history: Sequence[Turn] = (),
        **options: Unpack[AskOptions],
    ) -> Answer:
        """Answer a question about documents.

        Args:
            question: The question; it is what the lookup is routed by.
            documents: Texts, `Document`s, `Path`s of files and folders, or a `DocumentMemory` that was read before.
            system: System text.
            history: Earlier user and assistant turns about the same documents.
            **options: `mode`, `progress`, `on_lookup`, `cancel` (see `AskOptions`), and how tokens are chosen: `sampling`, or
                single fields of `Sampling` such as `max_tokens=64`.

        Raises:
            InvalidRequestError: Empty question, no `documents`, mode "query_aware" for documents that were read before, or an
                argument of the wrong type.
            DocumentError: An empty list of documents, one without text, or a file that cannot be read.
            InvalidConfigError: An option is unknown or out of range.
            CancelledError: `cancel` was set.
        """
        turns, memory = conversation(question, documents, system, history)
        return self.chat(turns, query=question, memory=memory, **options)

    def stream(
        self,
        question: str,
        documents: Documents | None = None,
        *,
        system: str | None = None,
        history: Sequence[Turn] = (),
        **options: Unpack[AskOptions],
    ) -> Iterator[Piece]:
        """Like `ask` (errors too), piece by piece; the last one carries the answer. Closing the iterator stops the model."""
        turns, memory = conversation(question, documents, system, history)
        return self.chat_stream(turns, query=question, memory=memory, **options)

    def chat(
        self,
        turns: Sequence[Turn],
        *,
        query: str | None = None,
        query_source: QuerySource = "explicit",
        memory: DocumentMemory | None = None,
        **options: Unpack[ChatOptions],
    ) -> Answer:
        """Answer a conversation.

        Args:
            turns: All turns; documents stand in user or tool turns.
            query: Text routed to the lookup. None: the last user turn's own text; "": none. A text that stands in no user
                turn is put into the prompt, ahead of the last user turn's own text at the latest.
            query_source: Which rule found `query`; reported back.
            memory: Documents read before; they count as the first ones of the first user turn.
            **options: As in `ask`, and `tools`, `logits_processors`, `template_kwargs` (see `ChatOptions`).

        Raises:
            InvalidRequestError: No turns, an argument of the wrong type, or a conversation the chat template refuses.
            DocumentError, InvalidConfigError, CancelledError: As `ask`.
        """
        request, cancelled = self._request(turns, query, query_source, memory, options)
        *_, last = serve_request(request, cancelled)
        assert last.answer is not None
        return last.answer

    def chat_stream(
        self,
        turns: Sequence[Turn],
        *,
        query: str | None = None,
        query_source: QuerySource = "explicit",
        memory: DocumentMemory | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Piece]:
        """Like `chat` (errors too), piece by piece. Closing the iterator stops the model within one chunk or token."""
        request, _ = self._request(turns, query, query_source, memory, options)

        def work(emit: Callable[[Piece], None], cancelled: Cancelled) -> None:
            for piece in serve_request(request, cancelled):
                emit(piece)

        return stream(work, options.get("cancel"))

    def _request(
        self,
        turns: Sequence[Turn],
        query: str | None,
        query_source: QuerySource,
        memory: DocumentMemory | None,
        options: ChatOptions,
    ) -> tuple[Request, Cancelled]:
        sampling, rest = split(options, ChatOptions)
        turns = as_turns(turns, memory)
        if memory is not None and rest.get("mode") == "query_aware":
            raise InvalidRequestError(
                f"mode='query_aware' reads the documents for the question, but those of {memory.id} were read before; leave "
                "mode out, or pass the documents themselves."
            )
        cancel = rest.pop("cancel", None)
        tokenizer = self._need_tokenizer()
        processors = rest.pop("logits_processors", None) or ()
        direct = lacks_room(tokenizer, sampling.max_tokens, processors)
        if any(isinstance(processor, GrammarProcessor) for processor in processors):
            sampling = replace(sampling, stop=())  # a stop string can be part of what the grammar demands
        request = Request(
            inference=self._inference,
            tokenizer=tokenizer,
            config=self.memory,
            turns=turns,
            query=query,
            query_source=query_source,
            memory=memory,
            sampling=sampling,
            sampler=Sampler(sampling, after_thoughts(tokenizer, processors)),
            direct=direct,
            **rest,
        )
        return request, never if cancel is None else cancel.is_set

    # ------------------------------------------------------------------ token ids

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]],
        query_span: tuple[int, int] | Sequence[tuple[int, int] | None] | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[list[int]]:
        """Continue token ids; needs no tokenizer unless there are stop strings.

        Args:
            input_ids: [n] or [batch, n] token ids, padded on the left where `attention_mask` is 0; or rows of unequal length.
            query_span: Half-open token span of the question within the row (padding included), or one per row.
            attention_mask: [batch, n], 0 on padding.
            progress: Called with (tokens read, tokens in all).
            cancel: Set it to stop within one chunk or one token.
            **options: How tokens are chosen: `sampling`, or single fields of `Sampling` such as `max_tokens=64`; not
                `logprobs`.

        Returns:
            New token ids of every row, end token (of the model or the tokenizer) and stop string excluded.

        Raises:
            InvalidRequestError: Ids, spans or mask do not fit each other or the model; an option of the wrong type.
            ContextOverflowError: A question longer than the local window.
            InvalidConfigError: An option is unknown or out of range.
            CancelledError: `cancel` was set.
        """
        settings, _ = split(options, SamplingOptions)
        check_sampling(settings)
        if settings.logprobs is not None:
            raise InvalidConfigError("generate() returns token ids without log-probabilities; leave logprobs out.")
        inference = self._inference
        if settings.stop and self.tokenizer is None:
            raise InvalidConfigError("Stop strings need a tokenizer; pass one to QLLM, or leave them out.")
        rows, spans = as_rows(
            input_ids, query_span, attention_mask, vocabulary=inference.vocabulary, any_span=self.memory.faithful
        )
        cancelled = never if cancel is None else cancel.is_set
        return answering.generate(inference, self.tokenizer, rows, spans, self.memory, settings, progress, cancelled)

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """Let go of the weights (they are freed when nobody shares them); later calls raise ClosedError."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"QLLM({self.name!r}, policy={self.memory.policy!r})"
