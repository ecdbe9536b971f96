"""Folders, code bases among them, as one document per file."""

from __future__ import annotations

import os
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

from qllm_runtime.documents import join_surrogates, load_document
from qllm_runtime.errors import DocumentError
from qllm_runtime.types import Document

_NAMED = 3  # files left out that a warning names
# A folder may come from anyone: no program that its git configuration names is run, as a monitor, a hook or a way to fetch.
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_NO_FETCH = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
# what is left of the caller's GIT_*: others make another repository, index or configuration answer
_KEPT = ("GIT_EXEC_PATH", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM")
_LIST = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")


def load_path(path: str | Path) -> list[Document]:
    """Read the file or the folder at a path, or standard input for `-`; see `load_document` and `load_folder`.

    Raises:
        DocumentError: What is there cannot be read.
    """
    try:
        folder = str(path) not in ("", "-") and Path(path).is_dir()
    except (OSError, ValueError):  # reading it will say what is wrong with the name
        folder = False
    return load_folder(path) if folder else [load_document(path)]


def load_folder(path: str | Path) -> list[Document]:
    """Read every text, HTML, PDF, Word and EPUB file below a folder.

    In a git checkout those are the files that git does not ignore, with those of submodules and of other checkouts inside
    of it (nothing that their configuration names is run). Elsewhere, and in a folder of a checkout that git ignores
    altogether, they are all but hidden ones (`.name`) and those in hidden folders. Empty files are passed over; files that
    hold anything but text are left out, and a warning says which.

    Args:
        path: The folder.

    Returns:
        The documents, sorted by path, each titled with its path below the folder (U+FFFD for what is not UTF-8 in it);
        `metadata["source"]` begins with `path`.

    Raises:
        DocumentError: Unreadable, or without a document in it.
    """
    folder = Path(path)
    try:
        names = sorted(name for name in set(_listed(folder)) if (folder / name).is_file())
        files = [name for name in names if (folder / name).stat().st_size]
    except OSError as error:
        raise DocumentError(f"Cannot read the folder {str(path)!r}: {error.strerror or error}.") from error
    documents: list[Document] = []
    left_out: list[str] = []
    for name in files:
        try:
            document = load_document(folder / name)
        except DocumentError as error:
            left_out.append(str(error))
        else:
            documents.append(replace(document, title=join_surrogates(name.as_posix())))
    if not documents:
        reason = f": {left_out[0]}" if left_out else "."
        raise DocumentError(f"There is no text, HTML, PDF, Word or EPUB file in the directory {str(path)!r}{reason}")
    if left_out:
        more = f" And {len(left_out) - _NAMED} more." if len(left_out) > _NAMED else ""
        warnings.warn(
            f"{len(left_out)} of {len(files)} files in {str(path)!r} are left out. {' '.join(left_out[:_NAMED])}{more}",
            stacklevel=2,
        )
    return documents


def _listed(folder: Path) -> list[Path]:
    """Files below a folder that are candidates for reading, some more than once."""
    files = _tracked(folder)
    if files or (files is not None and not _ignored(folder)):
        return files
    return _visible(folder)


def _tracked(folder: Path) -> list[Path] | None:
    """Files below a folder that git tracks or would track, some more than once; None outside of a checkout or without git."""
    listed = _git(folder, *_LIST)
    if listed is None:
        return None
    files: list[Path] = []
    for name in (Path(name.decode("utf-8", "surrogateescape")) for name in listed.split(b"\0") if name):
        nested = folder / name
        if nested.is_symlink() or not (nested / ".git").exists():
            files.append(name)
            continue
        # git names a checkout inside of another one, but not what is in it
        inside = _tracked(nested)
        files.extend(name / file for file in (_visible(nested) if inside is None else inside))
    return files


def _ignored(folder: Path) -> bool:
    """Whether a folder of a checkout is ignored as a whole; one with a `.gitignore` of `*` is not, its files are."""
    whole = folder.resolve()
    return not (whole / ".git").exists() and _git(whole.parent, "check-ignore", "-q", "--", whole.name) is not None


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints in a folder; None where it fails or is not installed."""
    environment = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith("GIT_")}
    command = [*_GIT, "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, check=True, stdin=subprocess.DEVNULL, env={**environment, **_NO_FETCH}
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _visible(folder: Path) -> list[Path]:
    """Files below a folder with no hidden part in their paths."""
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]
