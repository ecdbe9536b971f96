"""The programs of a launch side by side: at every access to memory another one may go on.

Triton's interpreter runs them one after the other, so that a program may rely on those before it, and pass. Here a seeded
scheduler decides who goes on. What they touch is compared as well, whatever came first this time: of two programs that touch
the same place, one of them writing, the first must release what it did by an atomic operation and the second acquire it. What
the threads of one program do to each other is not seen.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from triton.runtime import interpreter

_BUILDER = interpreter.interpreter_builder
_STACK = 1 << 20  # bytes of a program's thread
_ORDERED = {  # whether an atomic operation releases, and whether it acquires
    "RELEASE": (True, False),
    "ACQUIRE": (False, True),
    "ACQUIRE_RELEASE": (True, True),
    "RELAXED": (False, False),
}


class Access(NamedTuple):
    """Elements that a program touches at once.

    Attributes:
        program: Its number.
        clocks: How far each program had come, as far as this one has acquired.
        places: Their addresses.
        kind: read, write or atomic.
    """

    program: int
    clocks: np.ndarray
    places: np.ndarray
    kind: str


class Programs:
    """Stands in for the function of a kernel: waits until all programs of a launch are asked for, and runs them.

    Args:
        function: The kernel's function, as the interpreter has rewritten it.
        seed: Of the scheduler.
        races: Gets what no order exists for.
    """

    def __init__(self, function: Callable[..., None], seed: int, races: list[str]) -> None:
        self._function, self._draw, self._races = function, random.Random(seed), races
        self.__signature__, self.__name__ = inspect.signature(function), function.__name__
        self.__globals__, self.__annotations__ = function.__globals__, function.__annotations__
        self._asked: list[tuple[int, int, int]] = []
        self._log: list[Access] = []
        self._published: dict[int, np.ndarray] = {}

    def __call__(self, **arguments: Any) -> None:
        self._asked.append(_BUILDER.grid_idx)
        if len(self._asked) < int(np.prod(_BUILDER.grid_dim)):
            return
        n = len(self._asked)
        self._clocks = np.eye(n, dtype=np.int32)
        self._turns = [threading.Semaphore(0) for _ in range(n)]
        self._running, self._ended, self._error = set(range(n)), threading.Event(), None
        threads = [threading.Thread(target=self._program, args=(i, arguments), daemon=True) for i in range(n)]
        before = threading.stack_size(_STACK)
        with self._observed():
            for thread in threads:
                thread.start()
            threading.stack_size(before)
            self._hand_over()
            self._ended.wait()
            for thread in threads:
                thread.join()
        self._asked = []
        if self._error is not None:
            raise self._error
        self._races += _races(self.__name__, self._log)
        self._log, self._published = [], {}

    def _program(self, i: int, arguments: dict[str, Any]) -> None:
        self._turns[i].acquire()
        try:
            if self._error is None:
                self._function(**arguments)
        except BaseException as error:
            self._error = self._error or error
        self._running.discard(i)
        self._hand_over()

    def _hand_over(self) -> None:
        if not self._running:
            self._ended.set()
            return
        self._at = self._draw.choice(sorted(self._running))
        _BUILDER.grid_idx = self._asked[self._at]
        self._turns[self._at].release()

    def _switch(self) -> None:
        i = self._at
        self._hand_over()
        self._turns[i].acquire()
        if self._error is not None:
            raise RuntimeError("another program failed")

    def _touch(self, kind: str, pointer: Any, mask: Any) -> None:
        places = np.unique(np.broadcast_to(pointer.data, mask.data.shape)[mask.data.astype(bool)])
        self._log.append(Access(self._at, self._clocks[self._at].copy(), places, kind))

    @contextmanager
    def _observed(self) -> Iterator[None]:
        load, store, change = (getattr(_BUILDER, f"create_{x}") for x in ("masked_load", "masked_store", "atomic_rmw"))

        def loaded(pointer: Any, mask: Any, *rest: Any) -> Any:
            self._switch()
            self._touch("read", pointer, mask)
            return load(pointer, mask, *rest)

        def stored(pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._switch()
            self._touch("write", pointer, mask)
            return store(pointer, value, mask, *rest)

        def changed(operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
            self._switch()
            self._touch("atomic", pointer, mask)
            releases, acquires = _ORDERED[str(sem).rsplit(".", 1)[-1]]
            own = self._clocks[self._at]
            for place in self._log[-1].places.tolist():
                if acquires and place in self._published:
                    np.maximum(own, self._published[place], out=own)
                if releases:
                    known = self._published.get(place)
                    self._published[place] = own.copy() if known is None else np.maximum(known, own)
            own[self._at] += 1
            return change(operation, pointer, value, mask, sem, scope)

        with pytest.MonkeyPatch.context() as patch:
            for name, seen in (("masked_load", loaded), ("masked_store", stored), ("atomic_rmw", changed)):
                patch.setattr(_BUILDER, f"create_{name}", seen)
            yield


def _races(kernel: str, log: list[Access]) -> list[str]:
    """Pairs of accesses to one place by two programs that nothing puts in order, one of them a write."""
    written = np.unique(np.concatenate([x.places for x in log if x.kind != "read"] or [np.zeros(0, np.uint64)]))
    touched: dict[int, list[tuple[Access, int]]] = {}
    for access in log:
        for place in access.places[np.isin(access.places, written, assume_unique=True)].tolist():
            touched.setdefault(place, []).append(access)
    found = set()
    for accesses in touched.values():
        if len({x.program for x in accesses}) == 1:
            continue
        write: Access | None = None
        reads: dict[int, Access] = {}
        for access in accesses:
            before = [] if write is None else [write]
            before += list(reads.values()) if access.kind != "read" else []
            for one in before:
                atomic = one.kind == access.kind == "atomic"
                if (
                    one.program != access.program
                    and not atomic
                    and access.clocks[one.program] < one.clocks[one.program]
                ):
                    found.add(f"{kernel}: {one.kind} and then {access.kind} of another program, in no order")
            if access.kind == "read":
                reads[access.program] = access
            else:
                write, reads = access, {}
    return sorted(found)


@contextmanager
def interleaved(seed: int) -> Iterator[list[str]]:
    """Launches run their programs side by side; yields the races that were found."""
    races: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def side_by_side(executor: Any, *arguments: Any, **options: Any) -> None:
        function = executor.fn
        executor.fn = Programs(function, seed, races)
        try:
            launch(executor, *arguments, **options)
        finally:
            executor.fn = function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", side_by_side)
        yield races
