"""The model under test, the settings it is tested in, and one question asked of it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from qllm_bench.oracle import forced, needed_tokens
from qllm_bench.speed_measure import trained_length
from qllm_runtime.config import MemoryConfig, Policy
from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Document, Mode, Progress, Sampling, Turn

Order = Literal["first", "last", "both", "reread", "both-reread"]
ORDERS: tuple[Order, ...] = get_args(Order)
POLICIES: tuple[str, ...] = (*get_args(Policy), "oracle")
#: Orders in which passages are read again, and the same ones without.
REREAD: dict[Order, Order] = {"reread": "last", "both-reread": "both"}
_MODES: dict[Order, Mode] = {
    "first": "query_aware",
    "last": "read_once",
    "both": "query_aware",
    "reread": "read_once",
    "both-reread": "query_aware",
}


@dataclass(frozen=True)
class Setting:
    """How a document is read for a question.

    Attributes:
        name: Stands in keys and tables.
        memory: Layout and lookup.
        order: Where the question stands: ahead of the document, after it, or both (the paper's layout); "reread" and
            "both-reread": behind it or both, and the passages behind a draft are read again before the answer.
        oracle: Force the blocks that hold the answer into every lookup: the ceiling of what a better lookup could reach.
    """

    name: str
    memory: MemoryConfig
    order: Order = "both"
    oracle: bool = False

    @property
    def mode(self) -> Mode:
        """The engine's name of the layout."""
        return _MODES[self.order]

    @property
    def reads_once(self) -> bool:
        """Whether one reading serves all questions about a document."""
        return self.mode == "read_once"

    @property
    def reread(self) -> bool:
        """Whether passages are read again."""
        return self.order in REREAD


@dataclass(frozen=True)
class Example:
    """A document with a question and what an answer is worth.

    Attributes:
        document: The text.
        question: The question; routed to the lookup.
        closing: What stands after the document where that is more than the question; holds it.
        expected: The right answer, for the reader of the journal.
        score: Gives an answer a score from 0 to 1.
        spans: Character spans of the document that the answer rests on; needed for the oracle.
        system: System text ahead of everything.
        max_tokens: Most tokens of an answer.
        leads: Whether the question makes sense ahead of the document; where not, orders that have it ahead and after are read
            as those that have it after.
        reading: Names the document; of settings that read once, examples in a row with the same name share one reading.
    """

    document: str = field(repr=False)
    question: str
    expected: str
    score: Callable[[str], float]
    spans: tuple[tuple[int, int], ...] = ()
    closing: str | None = None
    system: str | None = None
    max_tokens: int = 256
    leads: bool = True
    reading: str | None = None

    def turns(self, order: Order) -> list[Turn]:
        """The conversation; a question ahead of the document is put there by the engine, where it is all there is to say."""
        document, closing = Document(self.document), self.closing or self.question
        system = [] if self.system is None else [Turn("system", (self.system,))]
        if order != "first":
            return [*system, Turn("user", (document, closing))]
        ahead = [] if closing == self.question else [Turn("user", (closing,))]
        return [*system, *ahead, Turn("user", (document,))]

    def mode(self, setting: Setting) -> Mode:
        """The engine's name of the layout."""
        return setting.mode if self.leads or setting.order == "first" else "read_once"


class Subject:
    """A model with the settings of its memory.

    Args:
        model, revision, device, dtype: As in `QLLM.from_pretrained`.
        changes: Memory settings that win over those fitted to the model.

    Attributes:
        llm: The engine; its memory is set per question.
        base: Memory settings that policies are derived from.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.llm = QLLM.from_pretrained(model, revision=revision, device=device, dtype=dtype)
        if self.llm.tokenizer is None:
            raise InvalidConfigError(f"{model!r} has no tokenizer; benchmarks of quality need one.")
        self.base = changed(self.llm.memory, changes or {})
        self._reading: tuple[str, DocumentMemory] | None = None

    # ------------------------------------------------------------------ facts

    @property
    def trained_length(self) -> int:
        """Tokens the model was trained for."""
        return trained_length(self.llm.model.config)

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.llm.model.device)

    @cached_property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with the weights."""
        return fingerprint(self.llm.model)

    def describe(self) -> dict[str, Any]:
        """Model and weights, for the journal's subject."""
        network = self.llm.model
        return {"model": self.llm.name, "weights": self.fingerprint, "dtype": str(network.dtype).removeprefix("torch.")}

    def chars_per_token(self, sample: str) -> float:
        """Characters per token of a text."""
        return len(sample) / max(1, self.llm.count_tokens(sample))

    # ------------------------------------------------------------------ settings

    def setting(self, policy: str, order: Order = "both", name: str | None = None, **changes: Any) -> Setting:
        """A policy under test: one of the engine's, or ``oracle`` (qllm with the right blocks forced in).

        Policies without lookups get a window as large as window and lookups of the others together, as far as the model
        was trained for it.

        Raises:
            InvalidRequestError: No such policy, or the oracle with passages that are read again.
            InvalidConfigError: Settings that don't fit each other or the model.
        """
        check_policies([policy])
        if policy == "oracle" and order in REREAD:
            raise InvalidRequestError(
                "The oracle chooses blocks, reread the passages behind a draft: they exclude each other; leave one out."
            )
        memory = changed(self.base, changes)
        if policy in ("streaming", "lm-infinite"):
            memory = memory.replace(policy=policy, n_local=min(memory.window, self.trained_length))
        else:
            memory = memory.replace(policy="qllm" if policy == "oracle" else policy)
        if memory.n_local > self.trained_length:
            raise InvalidConfigError(
                f"n_local={memory.n_local} exceeds the {self.trained_length} tokens that {self.llm.name!r} was trained for."
            )
        return Setting(name or policy, memory, order, policy == "oracle")

    def check_fits(self, settings: Sequence[Setting], tokens: int, question: int = 0) -> None:
        """Refuse prompts that a setting can't read.

        Args:
            settings: All that will be used.
            tokens: Longest prompt.
            question: Longest question, in tokens.

        Raises:
            InvalidRequestError: Dense attention over more tokens than the model was trained for, or a question longer than a
                local window.
        """
        for setting in settings:
            memory = setting.memory
            if memory.policy == "full" and tokens > self.trained_length:
                raise InvalidRequestError(
                    f"{self.llm.name!r} was trained for {self.trained_length:,} tokens, so policy 'full' cannot read "
                    f"{tokens:,}; leave that length or that policy out, or take a larger model."
                )
            if memory.policy != "full" and question > memory.n_local:
                raise InvalidRequestError(
                    f"Questions have up to {question} tokens, the local window of {setting.name!r} has {memory.n_local}; "
                    "raise --n-local."
                )

    # ------------------------------------------------------------------ questions

    def ask(self, setting: Setting, example: Example, progress: Progress | None = None) -> dict[str, Any]:
        """Ask, and score the answer.

        Returns:
            Columns of a row: ``score``, ``output``, ``expected``, ``question``, ``prompt_tokens``, ``read_s``, ``decode_s``.
        """
        llm = self.llm
        llm.memory = setting.memory
        turns, mode = example.turns(setting.order), example.mode(setting)
        options: dict[str, Any] = {"query": example.question, "progress": progress}
        force: Any = nullcontext()
        if setting.oracle:
            prompt = build_prompt(llm.tokenizer, turns, query=example.question, mode=mode)
            force = forced(needed_tokens(prompt, example.spans), setting.memory)
        if setting.reads_once and example.reading is not None:
            options |= {"memory": self._read(setting, example, progress)}
            turns[-1] = Turn("user", (example.closing or example.question,))
        with force:
            options |= {"mode": mode, "reread": setting.reread}
            answer = llm.chat(turns, sampling=Sampling(max_tokens=example.max_tokens), **options)
        return {
            "score": float(example.score(answer.text)),
            "output": answer.text,
            "expected": example.expected,
            "question": example.question,
            "prompt_tokens": answer.usage.prompt_tokens,
            "read_s": round(answer.timings.read_s, 4),
            "decode_s": round(answer.timings.decode_s, 4),
        }

    def _read(self, setting: Setting, example: Example, progress: Progress | None) -> DocumentMemory:
        """The document's reading; the last one is kept."""
        name = f"{setting.memory.model_dump_json()} {example.system} {example.reading}"
        if self._reading is None or self._reading[0] != name:
            self.forget()
            reading = self.llm.read(example.document, system=example.system, progress=progress)
            self._reading = (name, reading)
        return self._reading[1]

    def forget(self) -> None:
        """Free the reading that is kept."""
        if self._reading is not None:
            self._reading[1].close()
            self._reading = None


def fingerprint(network: Any) -> str:
    """Eight hexadecimal digits that change with the weights of a torch module."""
    import torch

    crc = 0
    for name, weight in network.named_parameters():
        sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // 256)].to("cpu", torch.float32)
        crc = zlib.crc32(sample.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def changed(base: MemoryConfig, changes: Mapping[str, Any]) -> MemoryConfig:
    """A memory configuration with changes; dependent settings are adjusted.

    ``exec_block_size`` stays within a smaller window; where every key represented its block it still does in blocks of
    another size.
    """
    extra: dict[str, Any] = {}
    if "n_local" in changes:
        extra["exec_block_size"] = min(base.exec_block_size, changes["n_local"])
    if "block_size" in changes:
        size = changes["block_size"]
        extra["repr_topk"] = size if base.repr_topk == base.block_size else min(base.repr_topk, size)
    return base.replace(**{**extra, **changes})


def check_policies(policies: Sequence[str]) -> None:
    """Refuse unknown policies.

    Raises:
        InvalidRequestError: One that neither the engine has nor is ``oracle``, or none at all.
    """
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown or not policies:
        raise InvalidRequestError(f"Unknown policy {', '.join(unknown) or '(none)'}; known: {', '.join(POLICIES)}.")
