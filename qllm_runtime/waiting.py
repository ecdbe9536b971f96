"""Requests to one model wait in line for it; waiting requests are not inherited by forked processes."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from qllm_runtime.errors import CancelledError
from qllm_runtime.types import Cancelled

_POLL_S = 0.05  # how long a cancelled request may go on waiting


def after_fork(act: Callable[[], None]) -> None:
    """Have `act` called in every forked process, in the order of these calls; there are none on Windows."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=act)


class FifoLock:
    """Who came first goes first; whoever waits can be cancelled."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: deque[object] = deque()

    @property
    def locked(self) -> bool:
        """Whether somebody holds it."""
        return bool(self._tickets)

    def acquire(self, cancelled: Cancelled) -> None:
        """Wait until everybody ahead has left.

        Raises:
            CancelledError: It was cancelled while waiting; its place is given up.
        """
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
            try:
                while self._tickets[0] is not ticket:
                    if cancelled():
                        raise CancelledError("Cancelled while waiting for the model.")
                    self._changed.wait(_POLL_S)
            except BaseException:
                self._tickets.remove(ticket)
                self._changed.notify_all()
                raise

    def release(self) -> None:
        """Let the next one in."""
        with self._changed:
            self._tickets.popleft()
            self._changed.notify_all()
