"""Single-token steps recorded as a CUDA graph: the device runs hundreds of launches that the host asks for with one.

A step can be captured if every layer takes its positions from device memory (`LayerMemory.prepare_step`). It is recorded
the second time it is met, as what runs for the first time (compilation, allocation) must not be recorded, and run again for as
long as all that it reads is the same. What precedes a step, such as turning tokens into blocks, runs before it as always.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel

from qllm_kernels.dispatch import warn_once
from qllm_runtime.cache import MemoryCache
from qllm_runtime.hooks import stand_in_mask
from qllm_runtime.memory.base import GraphStep
from qllm_runtime.memory.places import step_inputs

_SYNCHRONISES = "called a synchronizing"  # what torch says where the host waits for the device
_PROTOTYPE = "Synchronization debug mode is a prototype"  # and, once, of looking for that


class Recording(Protocol):
    """A step that was recorded, and where its logits will be."""

    logits: torch.Tensor

    def replay(self) -> None:
        """Run it again."""


#: Records a step without running it; the recording before it, if any, is not run any more and may share its memory.
Recorder = Callable[[Callable[[], torch.Tensor], Recording | None], Recording]


class CudaGraph:
    """A step as a CUDA graph of `device`; see `Recorder`."""

    def __init__(self, device: torch.device, step: Callable[[], torch.Tensor], before: Recording | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        pool = before._graph.pool() if isinstance(before, CudaGraph) else None
        try:
            with _capturing, torch.cuda.device(device), torch.cuda.stream(_stream(device)):
                _prepare(device)
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self.logits = step()
                finally:
                    self._graph.capture_end()
        except Exception:
            _failed.add(device)
            raise

    def replay(self) -> None:
        """Run it again."""
        self._graph.replay()


#: Devices on which a capture failed: torch's allocator may believe until the process ends that one is under way.
_failed: set[torch.device] = set()
_SPARE = 2**30  # bytes of a device that the results of a step's operations surely fit in
_capturing = threading.Lock()  # one capture at a time is all that CUDA allows a process


def _prepare(device: torch.device) -> None:
    """What `torch.cuda.graph` does ahead of a capture, except that memory in reserve stays so while there is other memory.

    It would give back the reserve of device and host each time: slabs to be pinned anew, buffers to be allocated anew.
    """
    torch.cuda.synchronize(device)
    if torch.cuda.mem_get_info(device)[0] < _SPARE:
        torch.cuda.empty_cache()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are recorded on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorder(model: PreTrainedModel) -> Recorder | None:
    """What records steps of `model`, or None where steps run launch by launch."""
    device = model.device
    if (
        device.type != "cuda"
        or device in _failed
        or any(parameter.device != device for parameter in model.parameters())
    ):
        return None
    return functools.partial(CudaGraph, device)


@contextmanager
def _waiting(device: torch.device) -> Iterator[list[str]]:
    """Collect what makes the host wait for the device, which no recording can hold."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _SYNCHRONISES in str(warning.message):
            found.append(str(warning.message).splitlines()[0])
        elif _PROTOTYPE not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class CapturedSteps:
    """The single-token steps of one sequence.

    Args:
        model: The model.
        record: What records its steps.
    """

    def __init__(self, model: PreTrainedModel, record: Recorder) -> None:
        self._model, self._record = model, record
        self._possible = "position_ids" in inspect.signature(model.forward).parameters
        self._recording: Recording | None = None
        self._recorded: tuple[object, ...] = ()  # what the recording reads
        self._met: tuple[object, ...] = ()  # what the step before read
        self._step_inputs: torch.Tensor | None = None
        self._waited = False  # the host, for the device, in the step before

    @property
    def recorded(self) -> bool:
        """Whether there is a recording to run."""
        return self._recording is not None

    def step(self, cache: MemoryCache, token: int) -> torch.Tensor | None:
        """Logits [1, vocab] that follow `token`, or None where the step must run on the host's numbers (nothing was done)."""
        if not self._possible:
            return None
        memories = cache.memories()
        steps = []
        for memory in memories:
            step = memory.prepare_step()
            if step is None:
                return None
            steps.append(step)
        reads = tuple(x for step in steps for x in step.reads)
        self._write(token, steps)
        assert self._step_inputs is not None
        for memory, numbers in zip(memories, self._step_inputs[1:], strict=True):
            memory.numbers = numbers
        try:
            logits = self._run(cache, reads)
        finally:
            for memory in memories:
                memory.numbers = None
        for memory in memories:
            memory.count()
        return logits

    def _write(self, token: int, steps: Sequence[GraphStep]) -> None:
        """Send the token, its position and the numbers of every layer to where the step reads them."""
        places = [step.numbers for step in steps]
        token_row = (token, *places[0][:1], *[0] * (len(places[0]) - 2))
        fresh = step_inputs([token_row, *places], self._model.device)
        if self._step_inputs is None:
            self._step_inputs = fresh
        else:
            self._step_inputs.copy_(fresh)

    def _run(self, cache: MemoryCache, reads: tuple[object, ...]) -> torch.Tensor:
        known = self._recording is not None and _same(reads, self._recorded)
        if not known:
            if not _same(reads, self._met):
                self._met = reads
                with _waiting(self._model.device) as found:
                    logits = self._forward(cache)
                if found and self._waited:
                    self._give_up(found[0])
                elif found:  # another thread may have been what waited: the next step is looked at as well
                    self._met = ()
                self._waited = bool(found)
                return logits
            try:
                self._recording = self._record(lambda: self._forward(cache), self._recording)
            except Exception as error:
                self._give_up(str(error.__context__ or error))
                return self._forward(cache)
            self._recorded = reads
        assert self._recording is not None
        self._recording.replay()
        return self._recording.logits.clone()

    def _give_up(self, reason: str) -> None:
        self._possible, self._recording = False, None
        name = type(self._model).__name__
        warn_once(f"Steps of {name} run launch by launch, without a CUDA graph: {(reason.splitlines() or [''])[0]}.")

    def _forward(self, cache: MemoryCache) -> torch.Tensor:
        assert self._step_inputs is not None
        ids, position = self._step_inputs[0, 0, None], self._step_inputs[0, 1, None]
        logits: torch.Tensor = self._model(
            input_ids=ids,
            position_ids=position,
            attention_mask=stand_in_mask(ids.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits[:, -1]


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(one) == len(other) and all(x is y for x, y in zip(one, other, strict=True))
