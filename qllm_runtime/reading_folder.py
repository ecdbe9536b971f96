"""The folder of a saved reading: what describes it, and how it is put in place. Loads neither torch nor transformers.

It holds `reading.json` (what was read, by which model), `documents.json` (the texts), `tokens.safetensors` (token ids and
their character offsets) and a `layer-N.safetensors` for the memory of each layer. Nothing in it is code.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue
from safetensors import SafetensorError

from qllm_runtime.errors import SavedReadingError

DESCRIPTION = "reading.json"
TEXTS = "documents.json"
TOKENS = "tokens.safetensors"


def layer_file(index: int) -> str:
    """Name of the file of a layer's memory."""
    return f"layer-{index:03}.safetensors"


class Reading(BaseModel):
    """What `reading.json` says.

    Attributes:
        qllm_reading: Version of the format.
        model: Name of the model that read, for people.
        fingerprint: Of its weights.
        dtype: Of the model, and of keys and values.
        layers: Layers of the model.
        memory: The `MemoryConfig`.
        system: System text ahead of the documents.
        template_kwargs: Variables of the chat template that were set.
        spans: Tokens [start, end) of each document.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    qllm_reading: Literal[1] = 1
    model: str
    fingerprint: str
    dtype: str
    layers: int
    memory: dict[str, JsonValue]
    system: str | None
    template_kwargs: dict[str, JsonValue]
    spans: list[tuple[int, int]]


def is_reading(path: Path) -> bool:
    """Whether a folder holds a reading."""
    try:
        with (path / DESCRIPTION).open(encoding="utf-8") as file:
            return '"qllm_reading"' in file.read(64)
    except (OSError, UnicodeDecodeError):
        return False


def check_target(path: Path) -> None:
    """Check that a reading may be written to `path`.

    Raises:
        SavedReadingError: Something else is there.
    """
    if path.exists() and not is_reading(path) and (not path.is_dir() or any(path.iterdir())):
        raise SavedReadingError(f"{str(path)!r} is there already and is not a reading; name another folder.")


def check_space(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `folder`.

    Raises:
        SavedReadingError: They do not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SavedReadingError(
            f"The reading takes about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free in {str(folder.parent)!r}; make "
            "room, or name a folder on another disk."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end of the block, and is gone if that fails.

    Raises:
        SavedReadingError: Something else is at `path`, or the folder cannot be written.
    """
    check_target(path)
    mark = uuid.uuid4().hex[:8]
    new, old = (path.with_name(f".{path.name}.{mark}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        for file in new.iterdir():  # safetensors leaves files to their owner alone
            file.chmod(new.stat().st_mode & 0o666)
        if path.exists():
            path.rename(old)
        new.rename(path)
    except (OSError, SafetensorError) as error:
        raise SavedReadingError(f"The reading cannot be written to {str(path)!r}: {error}.") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
