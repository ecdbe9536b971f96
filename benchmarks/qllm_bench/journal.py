"""Results on disk: one JSON object per line, appended as soon as a case is done."""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from qllm_bench.environment import environment
from qllm_runtime.errors import DocumentError, InvalidRequestError

Row = dict[str, Any]
_FIRST = b'{"subject": '


class _Lock:
    """Keeps other processes off a file for as long as it lives."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, descriptor)
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequestError(
                f"{path} is being written by another process; wait until it has ended, or give another --out."
            ) from None
        except OSError:  # a file system without locks
            return


#: By device and inode: the journals of one process share a lock.
_locks: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()


def _locked(path: Path) -> _Lock:
    lock = None
    if path.exists():
        lock = _locks.get((path.stat().st_dev, path.stat().st_ino))
    if lock is None:
        lock = _Lock(path)
        _locks[path.stat().st_dev, path.stat().st_ino] = lock
    return lock


class Journal:
    """The results of one benchmark, ``<out>/<name>.jsonl``.

    Three kinds of lines: ``{"subject": ...}`` (the first: what is measured), ``{"run": ...}`` (one per start: date, arguments,
    machine) and results, each with its ``key``. A file that is there is continued; a last line
    that was cut off is dropped, and of rows with one key the first counts. One process at a time has it.

    Args:
        out: Folder, made when it isn't there.
        name: Name of the benchmark.
        subject: What must be the same for results to stand in one file: model, fingerprint of its weights, prose, seed ...
            Whatever is part of the keys (lengths, policies, number of cases) doesn't belong here.

    Attributes:
        rows: Results so far, in order of appearance.

    Raises:
        InvalidRequestError: The file holds results of another subject, or another process has it.
        DocumentError: The file is not a journal, or the folder can't be written.
    """

    def __init__(self, out: Path, name: str, subject: Mapping[str, Any]) -> None:
        self.name = name
        self.path = out / f"{name}.jsonl"
        self.subject: Row = json.loads(json.dumps(subject))
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            lines = self._lines()
            if not lines:
                self._write({"subject": self.subject})
        except OSError as error:
            raise DocumentError(f"Cannot keep results in {str(out)!r}: {error.strerror or error}.") from None
        self.runs = [line for line in lines[1:] if "run" in line]
        rows: dict[str, Row] = {}
        for line in lines[1:]:
            if "run" not in line:
                rows.setdefault(line["key"], line)
        self.rows = list(rows.values())
        before = lines[0]["subject"] if lines else self.subject
        if before != self.subject:
            different = sorted(k for k in {*before, *self.subject} if before.get(k) != self.subject.get(k))
            was = ", ".join(f"{k}={before.get(k)!r} (now {self.subject.get(k)!r})" for k in different)
            raise InvalidRequestError(
                f"{self.path} holds results of {was}; give another --out, or remove the file to start anew."
            )
        self.keys = set(rows)

    def _lines(self) -> list[Row]:
        """What the file holds; cuts a line off that was being written when the run ended."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in data[:whole].splitlines()]
            if lines and ("subject" not in lines[0] or not all("run" in x or "key" in x for x in lines[1:])):
                raise ValueError
            if not whole and not data.startswith(_FIRST[: len(data)]):
                raise ValueError
        except (ValueError, TypeError):
            raise DocumentError(
                f"{self.path} is not a journal of this benchmark; give another --out, or remove it."
            ) from None
        if whole < len(data):
            os.truncate(self.path, whole)
        return lines

    def _write(self, line: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, arguments: Mapping[str, Any], device: str = "cpu") -> None:
        """Note a start: when, with which arguments, on which machine; warns of results of another engine's code."""
        run: Row = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "arguments": json.loads(json.dumps(arguments, default=str)),
            **environment(device),
        }
        if self.rows and any(line["run"].get("engine") != run["engine"] for line in self.runs):
            print(
                f"{self.name}: some results in {self.path} were made before the engine or its questions changed; "
                "remove it to start anew.",
                file=sys.stderr,
            )
        self.runs.append({"run": run})
        self._write(self.runs[-1])

    def append(self, row: Row) -> None:
        """Add a result; it is on disk when this returns."""
        self._write(row)
        self.rows.append(row)
        self.keys.add(row["key"])

    def report(self, **tables: Any) -> Path:
        """Write ``<name>.json`` beside the journal: subject, runs and tables; returns its path."""
        path = self.path.with_suffix(".json")
        report = {
            "benchmark": self.name,
            "subject": self.subject,
            "runs": [line["run"] for line in self.runs],
            "cases": len(self.rows),
            **tables,
        }
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path
