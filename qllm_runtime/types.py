"""Inputs and outputs of a request. Plain data; importing this loads neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from qllm_runtime.errors import InvalidConfigError, InvalidRequestError

Mode = Literal["query_aware", "read_once"]
FinishReason = Literal["stop", "length"]
QuerySource = Literal["explicit", "block", "message", "fallback", "none"]

#: Called while a document is read with (tokens read so far, tokens in all).
Progress = Callable[[int, int], None]
#: Polled before every chunk and after every token; return True to cancel.
Cancelled = Callable[[], bool]


def never() -> bool:
    """A request that is never cancelled."""
    return False


def check_mode(mode: str | None) -> None:
    """Accept the modes there are, and None for the default.

    Raises:
        InvalidConfigError: An unknown mode.
    """
    if mode not in (None, *get_args(Mode)):
        raise InvalidConfigError(f"mode={mode!r} is unknown; known are: {', '.join(get_args(Mode))}.")


@dataclass(frozen=True)
class Document:
    """A whole document.

    Attributes:
        text: Its text, exactly as sources will quote it.
        title: Shown to the model ahead of the text and reported with every source.
        metadata: Anything the caller wants to find again; never shown to the model.
    """

    text: str
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Document(title={self.title!r}, characters={len(self.text)})"


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but white space and byte order marks."""
    return not text.replace("\ufeff", "").strip()


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: Its parts in order. A `Document` is read as a document, a `str` is ordinary text. A single part may be given
            as it is: `Turn("user", "Who wrote the letter?")`.
        extras: Further keys of the message that the chat template understands (`tool_calls`, `tool_call_id`, `name`).

    Raises:
        InvalidRequestError: A part that is neither.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[str | Document, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    if TYPE_CHECKING:  # what `content` may be given as

        def __init__(
            self,
            role: Literal["system", "user", "assistant", "tool"],
            content: str | Document | Iterable[str | Document] = (),
            extras: Mapping[str, Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        given: Any = self.content
        parts = (given,) if isinstance(given, str | Document) or not isinstance(given, Iterable) else tuple(given)
        for part in parts:
            if not isinstance(part, str | Document):
                raise InvalidRequestError(
                    f"A turn holds texts and Documents, not {type(part).__name__}; pass a str, a Document or a tuple of these."
                )
        object.__setattr__(self, "content", parts)

    @property
    def text(self) -> str:
        """The ordinary text of the turn, without its documents and empty parts."""
        return "\n\n".join(part for part in self.content if isinstance(part, str) and part)

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents of the turn, in order."""
        return tuple(part for part in self.content if isinstance(part, Document))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy.

    Attributes:
        max_tokens: Upper bound of generated tokens. A thought takes at most three quarters of them and is closed then; below
            64 a model that can do without one (its chat template knows `enable_thinking`) answers at once.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p, top_k, min_p: The usual truncations (None: off).
        repetition_penalty: Applied to tokens of the answer only, never to the document's.
        seed: Makes sampling reproducible.
        stop: Strings that end the answer; never part of it. Without effect on an answer that a grammar holds to a schema or a
            tool call: the grammar says where it ends.
        logprobs: Number of alternatives to report per token (None: no log-probabilities at all, 0: the chosen token only).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Source:
    """A passage that was looked up while the answer was written.

    Attributes:
        document: Index of the document in the request.
        title: Its title, if it has one.
        start, end: Character span, `text == document.text[start:end]`.
        score: Share of the answer's attention to documents by which this passage stands out from its surroundings (0..1).
        text: The passage.
    """

    document: int
    title: str | None
    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True)
class Usage:
    """Token counts of a request.

    Attributes:
        prompt_tokens: Tokens of the whole prompt, read now or earlier; of passages that are read again, once.
        completion_tokens: Tokens generated, thoughts included.
        cache_read_tokens: Part of the prompt that came from a document memory read earlier.
        cache_creation_tokens: Part of the prompt that this request wrote into a memory that outlives it.
        reasoning_tokens: Part of the completion that is thought, its marks included.
    """

    prompt_tokens: int
    completion_tokens: int
    cache_read_tokens: int = 0
    cache_creation_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds, tokens per second and bytes of a request.

    Attributes:
        tokenize_s, read_s, decode_s, total_s: Seconds for tokenising, reading what is new, writing the answer, all.
        reread_s: Seconds for finding passages (draft, lookups and, once per model, which layer to listen to) and reading them
            again.
        read_tokens_per_s, decode_tokens_per_s: Throughput; 0 when nothing was read or written.
        peak_memory_bytes: Peak of the device (CUDA) or of the process (CPU).
    """

    tokenize_s: float = 0.0
    read_s: float = 0.0
    reread_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    read_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one generated token and of its best alternatives."""

    token: str
    token_id: int
    logprob: float
    top: tuple[tuple[str, int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """The result of a request.

    Attributes:
        text: The answer, without stop strings, special tokens and thoughts.
        sources: Passages behind it, best first.
        usage, timings: Counts and times.
        finish_reason: "stop" (end token or stop string) or "length" (max_tokens).
        query: The text that was routed to the lookup ("" when none was).
        query_source: Which rule found the query.
        mode: How the documents were read.
        reread: Whether passages found by a draft were read again before the answer.
        reasoning: What a reasoning model wrote between its marks ahead of the answer ("" for others).
        token_ids: The generated token ids, those of thoughts included, end token excluded.
        logprobs: One entry per token of the answer when asked for; thoughts have none.
    """

    text: str
    sources: tuple[Source, ...] = ()
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    timings: Timings = field(default_factory=Timings)
    finish_reason: FinishReason = "stop"
    query: str = ""
    query_source: QuerySource = "none"
    mode: Mode = "read_once"
    reread: bool = False
    reasoning: str = ""
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer, or of the thought ahead of it. The last one carries `answer` and may have empty `text`."""

    text: str
    answer: Answer | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
