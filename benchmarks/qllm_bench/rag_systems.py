"""What is compared: the whole document read by the model, and the usual pipeline that puts retrieved chunks before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from qllm_bench.questions.data import Case
from qllm_bench.subject import fingerprint
from qllm_integrations.langchain import QLLM_STUFF_PROMPT, QLLMChat
from qllm_runtime.errors import InvalidRequestError, ModelNotFoundError
from qllm_runtime.types import Progress

if TYPE_CHECKING:
    from qllm_bench.subject import Setting, Subject

#: Longest answer, and what the chat template and separators take (tokens).
ANSWER, TEMPLATE = 80, 16
_READINGS = {
    "last": "read once",
    "reread": "passages read again",
    "both": "read for the question",
    "both-reread": "read for the question, passages read again",
}


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: The answer.
        prompt_tokens: Tokens of the prompt it was given to.
        hit: Whether everything the answer rests on was retrieved; None where nothing is retrieved or to be found.
        search_s: Seconds spent on retrieval.
    """

    text: str
    prompt_tokens: int
    hit: bool | None = None
    search_s: float = 0.0


class System(Protocol):
    """A way of answering questions about one document at a time."""

    name: str

    def index(self, document: str, progress: Progress) -> None:
        """Take in a document; frees the one before."""

    def answer(self, case: Case, progress: Progress) -> Reply:
        """Answer a question about it."""


class Whole:
    """The model reads the whole document: once for all questions ("last", "reread") or anew for each one.

    Args:
        subject: The model.
        setting: Policy and order.
    """

    def __init__(self, subject: Subject, setting: Setting) -> None:
        self.name = f"whole, {_READINGS[setting.order]}"
        self.reads_once = setting.reads_once
        self.setting = setting
        self._llm = subject.llm
        self._document: Any = None

    def index(self, document: str, progress: Progress) -> None:
        """Read it where that does not depend on the question."""
        if not self.reads_once:
            self._document = document
            return
        if self._document is not None:
            self._document.close()
        self._llm.memory = self.setting.memory
        self._document = self._llm.read(document, progress=progress)

    def answer(self, case: Case, progress: Progress) -> Reply:
        """Ask the model."""
        self._llm.memory = self.setting.memory
        answer = self._llm.ask(
            case.question,
            self._document,
            mode=self.setting.mode,
            reread=self.setting.reread,
            max_tokens=ANSWER,
            progress=progress,
        )
        return Reply(answer.text, answer.usage.prompt_tokens)


class Chunks:
    """A document in chunks, and which of them to read for a question."""

    def __init__(self, chunks: Sequence[Document]) -> None:
        self.chunks = list(chunks)

    def rank(self, case: Case, count: int) -> list[Document]:
        """The best chunks, best first."""
        raise NotImplementedError


class Lexical(Chunks):
    """BM25 (Robertson and Zaragoza 2009), by bm25s."""

    def __init__(self, chunks: Sequence[Document]) -> None:
        super().__init__(chunks)
        library = _bm25s()
        self._words = partial(library.tokenize, stopwords="en", show_progress=False)
        self._index = library.BM25()
        self._index.index(self._words([chunk.page_content for chunk in chunks]), show_progress=False)

    def rank(self, case: Case, count: int) -> list[Document]:
        """By their words."""
        count = min(count, len(self.chunks))
        found, _ = self._index.retrieve(self._words([case.question]), k=count, show_progress=False)
        return [self.chunks[int(n)] for n in found[0]]


def _bm25s() -> Any:
    import bm25s

    return bm25s


class Perfect(Lexical):
    """The chunks that hold the answer first: retrieval that cannot miss, so that what is left is reading."""

    def rank(self, case: Case, count: int) -> list[Document]:
        """For every statement the answer rests on the chunk that holds most of it, then by BM25."""
        order = [self._holders(span)[0] for span in case.spans]
        order += [chunk for span in case.spans for chunk in self._holders(span)[1:]]
        unique = {start(chunk): chunk for chunk in (*order, *super().rank(case, count))}
        return list(unique.values())[:count]

    def _holders(self, span: tuple[int, int]) -> list[Document]:
        shares = [(min(span[1], end(c)) - max(span[0], start(c)), c) for c in self.chunks]
        return [c for share, c in sorted(shares, key=lambda pair: -pair[0]) if share > 0]


class Vectors(Chunks):
    """Embeddings in LangChain's in-memory vector store, by cosine."""

    def __init__(self, chunks: Sequence[Document], embeddings: Embeddings) -> None:
        super().__init__(chunks)
        self._store = InMemoryVectorStore.from_documents(self.chunks, embeddings)

    def rank(self, case: Case, count: int) -> list[Document]:
        """By their meaning."""
        return self._store.similarity_search(case.question, k=count)


class Retrieval:
    """The usual pipeline: splitter, retriever, and the same model over as many chunks as its budget takes.

    The model reads question and chunks with plain attention: the prompt and the longest answer stay within the length it was
    trained for, and the prompt within the attention window of the whole-document rows.

    Args:
        subject: The model.
        setting: The whole-document setting to compare with.
        kind: "bm25", "perfect", or the name of `embeddings`.
        chunk_tokens: Largest chunk; neighbours share a quarter of it.
        loading: How the subject was loaded (revision, device, dtype), so that its weights are shared.
        embeddings: Where `kind` is their name.

    Raises:
        InvalidRequestError: Not even one chunk fits.
    """

    def __init__(
        self,
        subject: Subject,
        setting: Setting,
        kind: str,
        chunk_tokens: int,
        loading: Mapping[str, Any],
        embeddings: Embeddings | None = None,
    ) -> None:
        self.name = f"{kind}, {chunk_tokens}"
        self._kind, self._embeddings, self._count = kind, embeddings, subject.llm.count_tokens
        self._budget = min(setting.memory.window, subject.trained_length - ANSWER) - TEMPLATE
        if chunk_tokens > self._budget // 2:
            raise InvalidRequestError(
                f"A chunk of {chunk_tokens} tokens and a question do not fit the {self._budget} tokens that "
                f"{subject.llm.name!r} can be given; choose smaller --chunks."
            )
        self._splitter = RecursiveCharacterTextSplitter(
            chunk_size=chunk_tokens, chunk_overlap=chunk_tokens // 4, length_function=self._count
        )
        chat = QLLMChat(
            model=subject.llm.name,
            memory=setting.memory.replace(policy="full"),
            mode="read_once",
            max_tokens=ANSWER,
            **loading,
        )
        self._chain = QLLM_STUFF_PROMPT | chat
        self._chunks: Chunks | None = None

    def index(self, document: str, progress: Progress) -> None:
        """Split it and build the index."""
        chunks = placed(document, self._splitter.split_text(document))
        if self._embeddings is not None:
            self._chunks = Vectors(chunks, self._embeddings)
        else:
            self._chunks = Perfect(chunks) if self._kind == "perfect" else Lexical(chunks)

    def answer(self, case: Case, progress: Progress) -> Reply:
        """Retrieve, fill the budget best first, and ask."""
        assert self._chunks is not None
        began = time.perf_counter()
        room = self._budget - self._count(case.question)
        chosen: list[Document] = []
        for chunk in self._chunks.rank(case, self._budget // 8):
            text = "\n\n".join(c.page_content for c in (*chosen, chunk))
            if self._count(text) > room:
                break
            chosen.append(chunk)
        search_s = time.perf_counter() - began
        context = "\n\n".join(chunk.page_content for chunk in chosen)
        message = self._chain.invoke({"context": context, "input": case.question})
        tokens = message.usage_metadata["input_tokens"] if message.usage_metadata else 0
        return Reply(str(message.text), tokens, covered(case, chosen) if case.spans else None, search_s)


def placed(document: str, texts: Sequence[str]) -> list[Document]:
    """Chunks with their place in the document.

    The splitter's own `add_start_index` takes the overlap for characters and is wrong where lengths are tokens.
    """
    chunks, at = [], -1
    for text in texts:
        at = document.index(text, at + 1)
        chunks.append(Document(text, metadata={"start_index": at}))
    return chunks


def start(chunk: Document) -> int:
    """Where a chunk begins in its document (characters)."""
    return int(chunk.metadata["start_index"])


def end(chunk: Document) -> int:
    """Where it ends."""
    return start(chunk) + len(chunk.page_content)


def covered(case: Case, chunks: Sequence[Document]) -> bool:
    """Whether the chunks together hold all statements the answer rests on; white space between chunks may be missing."""
    for begin, stop in case.spans:
        for chunk in sorted(chunks, key=start):
            if begin < end(chunk) and not case.document[begin : start(chunk)].strip():
                begin = end(chunk)
        if case.document[begin:stop].strip():
            return False
    return True


class MeanPooled(Embeddings):
    """A sentence-embedding model of transformers: token states averaged, length 1.

    Attributes:
        name: The end of its path and eight hexadecimal digits that change with the weights.

    Args:
        model: Folder or Hugging Face hub id.

    Raises:
        ModelNotFoundError: It can't be loaded.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModel.from_pretrained(model).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelNotFoundError(f"Cannot load the embedding model {model!r}: {reason}") from None
        # two models may have one name
        self.name = f"{model.rstrip('/').rsplit('/', 1)[-1]} {fingerprint(self._model)}"
        self._longest: int = min(
            self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 512)
        )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        import torch

        vectors: list[list[float]] = []
        for n in range(0, len(texts), 32):
            batch = self._tokenizer(
                texts[n : n + 32], padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
            )
            with torch.inference_mode():
                states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors += torch.nn.functional.normalize(mean, dim=-1).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self.embed_documents([text])[0]
