"""Running one model on memories: reading in chunks, one-token steps, one request at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from qllm_kernels.dispatch import backend, on_device
from qllm_runtime import captured
from qllm_runtime.cache import MemoryCache
from qllm_runtime.captured import CapturedSteps
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import CancelledError, ClosedError, InvalidConfigError, InvalidRequestError, OutOfMemoryError
from qllm_runtime.hooks import decoder_of, device_of, evaluating, is_out_of_memory, stand_in_mask
from qllm_runtime.memory.base import LayerMemory
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.dense import DenseMemory
from qllm_runtime.memory.pieces import Pieces
from qllm_runtime.memory.published import PublishedMemory, PublishedWindow
from qllm_runtime.rotary import thetas
from qllm_runtime.seam import ModelFacts, examine, installed
from qllm_runtime.types import Cancelled, never
from qllm_runtime.waiting import FifoLock, after_fork

# by the model's id, which is its own as long as its entry lives: the entry's value holds the model
_serving: weakref.WeakValueDictionary[int, Inference] = weakref.WeakValueDictionary()
_serving_lock = threading.Lock()


def _after_fork() -> None:
    """Threads that hold locks do not live on in a forked process."""
    global _serving_lock
    _serving_lock = threading.Lock()
    for inference in list(_serving.values()):
        inference.forked()


after_fork(_after_fork)


class Inference:
    """One model, used by one request at a time.

    Args:
        model: A decoder-only model of transformers.

    Attributes:
        captures: Steps of single sequences are recorded and run again where that is possible.
        forked_mid_request: This process is a fork made during a request; the model's state is inconsistent, and every request
            raises ClosedError.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.captures = True
        self._lock = FifoLock()
        self._holder: int | None = None  # thread whose turn it is
        self._at_work = False  # inside of `request`
        self.forked_mid_request = False
        self._steps: weakref.WeakKeyDictionary[MemoryCache, CapturedSteps] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Inference:
        """The one that serves `model`, so that all its users wait for each other."""
        with _serving_lock:
            found = _serving.get(id(model))
            if found is None:
                found = _serving[id(model)] = cls(model)
            return found

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._lock.locked

    @property
    def facts(self) -> ModelFacts:
        """What the probe found.

        Raises:
            UnsupportedModelError: The architecture cannot be served.
            InvalidConfigError: The environment variable QLLM_KERNELS has an unknown value.
        """
        self._check_backend()
        return examine(self.model)

    @property
    def vocabulary(self) -> int:
        """Tokens the model has an embedding for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def trained_length(self) -> int | None:
        """Tokens the model was trained for, as its configuration says."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(length) if length and length > 0 else None

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens.

        Raises:
            UnsupportedModelError: Its weights were not loaded.
        """
        return device_of(self.model)

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer is."""
        facts, layers = self.facts, getattr(decoder_of(self.model), "layers", ())
        return [facts.layers[i].device if i in facts.layers else device_of(layers[i]) for i in range(len(facts.slots))]

    @contextmanager
    def turn(self, cancelled: Cancelled = never) -> Iterator[None]:
        """Keep others waiting from the first part of a request to its last, so that one request's memory is held at a time.

        Raises:
            CancelledError: While waiting.
            ClosedError: This process was forked while the model was at work in the other one.
            InvalidRequestError: A callback of a request makes another one, which would wait for itself.
        """
        if self.forked_mid_request:
            raise ClosedError(
                "This process was forked while the model was answering, so its copy of the model is half-way through that "
                "request; load models after the fork."
            )
        if self._holder == threading.get_ident():
            raise InvalidRequestError(
                "A request was made from inside another one (a progress or on_lookup callback); make it afterwards."
            )
        lock = self._lock
        lock.acquire(cancelled)
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            lock.release()

    @contextmanager
    def request(self, cancelled: Cancelled = never) -> Iterator[None]:
        """Use the model, in the turn of this thread or in one of its own.

        Raises:
            OutOfMemoryError: Instead of the many kinds of out-of-memory errors of host and device.
            CancelledError, ClosedError, InvalidRequestError: As `turn`.
        """
        mine = self._holder == threading.get_ident() and not self._at_work
        with nullcontext() if mine else self.turn(cancelled):
            self._at_work = True
            try:
                with self._ready():
                    yield
            finally:
                self._at_work = False

    @contextmanager
    def _ready(self) -> Iterator[None]:
        self._check_backend()
        try:
            with torch.inference_mode(), evaluating(self.model), installed(self.model), on_device(self.device):
                yield
        except OutOfMemoryError:  # of a callback
            raise
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(error) from error
            raise

    def _check_backend(self) -> None:
        """Name a bad QLLM_KERNELS before the model is examined, which would take it for a fault of the model."""
        try:
            backend(self.device)
        except ValueError as error:
            raise InvalidConfigError(str(error)) from None

    def forked(self) -> None:
        """This process is a copy of one in which requests were waiting or under way."""
        self.forked_mid_request = self.forked_mid_request or self._holder is not None
        self._lock, self._holder, self._at_work = FifoLock(), None, False

    def _out_of_memory(self, error: BaseException) -> OutOfMemoryError:
        place = self.device
        text = (str(error).splitlines() or [""])[0]
        if place.type == "cuda":
            free, total = torch.cuda.mem_get_info(place)
            torch.cuda.empty_cache()
            text += f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB were free)"
        return OutOfMemoryError(
            f"Out of memory on {place}: {text}. A smaller chunk_size lowers the peak while reading, a smaller n_local or topk "
            "the window, dtype='bfloat16' or 'float16' halves the key/value memory, "
            "device_blocks keeps most of it on the host; close() frees documents read before."
        )

    def cache(self, config: MemoryConfig, *, rows: int = 1, reserve: int = 0) -> MemoryCache:
        """Empty memories for `rows` sequences of about `reserve` tokens.

        Raises:
            InvalidConfigError: The configuration is meant for another rotary base.
        """
        facts = self.facts
        known = thetas(self.model.config.get_text_config())
        if config.rope_theta is not None and known and config.rope_theta not in known:
            raise InvalidConfigError(
                f"The memory configuration is meant for a rotary base (rope_theta, 'base') of {config.rope_theta:g}, the model "
                f"has {', '.join(f'{theta:g}' for theta in sorted(known))}; leave it out, or load the model with it."
            )

        def make(layer: int, row: int) -> LayerMemory:
            info = facts.layers[layer]
            held = config.n_init + config.n_local + config.block_size + config.exec_block_size
            # the published code puts its own attention in place of every layer's, whatever window that had
            sliding = None if config.faithful else info.sliding_window
            frame = sliding + 1 if sliding else (reserve if config.policy == "full" else held)
            rotation = facts.rotation(layer, info.device, frame)
            if sliding is not None:
                return DenseMemory(rotation, sliding)
            if config.policy == "full":
                return DenseMemory(rotation, reserve=reserve)
            if config.faithful:
                kind = PublishedMemory if config.uses_blocks else PublishedWindow
                return kind(config, rotation, None)
            return BlockMemory(config, rotation, reserve)

        cache = facts.cache(make)
        cache.prepare(rows)
        return cache

    def read(
        self,
        cache: MemoryCache,
        rows: Sequence[torch.Tensor],
        config: MemoryConfig,
        *,
        borders: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
        cancelled: Cancelled = never,
    ) -> None:
        """Run new tokens through the model without computing logits.

        Args:
            cache: Memories, one row per sequence.
            rows: [n_row] token ids of each row; lengths may differ.
            config: Sizes of chunks and pieces.
            borders: Where documents end within a single row, in order: what follows is read as if it were read later.
            progress: Called after every chunk with the number of tokens read in it.
            cancelled: Polled before every chunk.
        """
        if cache.recurrent and len(rows) > 1:
            for row, tokens in enumerate(rows):
                if len(tokens):
                    self.read(cache.alone(row), [tokens], config, progress=progress, cancelled=cancelled)
            return
        piece = config.exec_block_size
        chunk = config.chunk_size if config.faithful else max(piece, config.chunk_size // piece * piece)
        decoder = decoder_of(self.model)
        for memory in cache.memories() if borders else ():
            memory.cut_pieces([memory.n_seen + border for border in borders])
        pieces = Pieces(piece).anew(borders)
        start, n = 0, max(len(row) for row in rows)
        while start < n:
            if cancelled():
                raise CancelledError("Cancelled while reading.")
            end = min(start + chunk if config.faithful else pieces.last_end(start + chunk), n)
            parts = [row[start:end] for row in rows]
            start = end
            ids = self._batch(cache, parts)
            places = self._places(cache, *ids.shape)
            mask = stand_in_mask(ids.device)
            decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **places)
            if progress is not None:
                progress(sum(len(part) for part in parts))

    def step(self, cache: MemoryCache, tokens: Sequence[int | None]) -> torch.Tensor:
        """Feed one token per row (None: the row is finished) and return logits [rows, vocab]."""
        if cache.recurrent and len(tokens) > 1:
            outs = [None if token is None else self.step(cache.alone(row), [token]) for row, token in enumerate(tokens)]
            blank = torch.zeros_like(next(out for out in outs if out is not None))
            return torch.cat([blank if out is None else out for out in outs])
        cache.lengths = [0 if token is None else 1 for token in tokens] if None in tokens else None
        # states of recurrent layers change in ways of the model's own, which no recording was tried with
        if len(tokens) == 1 and tokens[0] is not None and self.captures and not cache.recurrent:
            captured_logits = self._captured_step(cache, tokens[0])
            if captured_logits is not None:
                return captured_logits
        ids = torch.tensor([[token or 0] for token in tokens], device=self.device)
        mask = stand_in_mask(ids.device)
        logits: torch.Tensor = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **self._places(cache, *ids.shape)
        ).logits
        return logits[:, -1]

    def _places(self, cache: MemoryCache, rows: int, n: int) -> dict[str, torch.Tensor]:
        """Each row's own positions, where there are several: some models scale queries by them."""
        if rows == 1:
            return {}
        starts = torch.tensor([[cache.memories(row)[0].n_seen] for row in range(rows)], device=self.device)
        return {"position_ids": starts + torch.arange(n, device=self.device)}

    def records(self, cache: MemoryCache) -> bool:
        """Whether steps of this sequence are run from a recording now."""
        steps = self._steps.get(cache)
        return steps is not None and steps.recorded

    def _captured_step(self, cache: MemoryCache, token: int) -> torch.Tensor | None:
        steps = self._steps.get(cache)
        if steps is None:
            record = captured.recorder(self.model)
            if record is None:
                return None
            steps = self._steps[cache] = CapturedSteps(self.model, record)
        return steps.step(cache, token)

    def _batch(self, cache: MemoryCache, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        lengths = [len(part) for part in parts]
        cache.lengths = None if min(lengths) == max(lengths) else lengths
        ids = torch.zeros(len(parts), max(lengths), dtype=torch.long)
        for row, part in zip(ids, parts, strict=True):
            row[: len(part)] = part
        return ids.to(self.device)
