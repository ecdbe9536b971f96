"""Prose to hide facts in: generated stories or one's own books, development and test documents apart."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qllm_bench.questions.data import HELD_OUT, Prose, unwrap
from qllm_runtime.errors import DocumentError
from qllm_runtime.samples import story

Split = Literal["development", "test"]


class Library:
    """The prose of one split.

    Args:
        split: Settings are chosen on "development" and reported on "test"; the two share no text.
        text: Folder of .txt files; None: stories made on the spot. Where the folder has books that the readers were not
            trained on (`HELD_OUT`), these are the test documents and all others are for development; elsewhere a hash of
            each file decides.

    Attributes:
        name: What it is, for reports: where it comes from and eight hexadecimal digits that change with its text.

    Raises:
        DocumentError: No such folder, or too few files for two splits.
    """

    def __init__(self, split: Split, text: Path | None = None) -> None:
        self.split = split
        self._books: list[Prose] = []
        if text is None:
            source, whole = "generated stories", "\n\n".join(story(random.Random("prose"), 20_000))
        else:
            files = _read(text)
            source, whole = text.resolve().name, "\n\n".join(files.values())
            self._books = [Prose.of(book) for book in _side(text, files, split)]
        self.name = f"{source} {zlib.crc32(whole.encode()):08x}"

    def draw(self, rng: random.Random, n_chars: int) -> Prose:
        """Prose of at least ``n_chars`` characters: a story of its own, or books from a random one on.

        Books that hold less in all are repeated.
        """
        if not self._books:
            seed = f"{self.split}-{rng.getrandbits(64)}"
            # story() counts two line ends more than there are
            return Prose.of("\n\n".join(story(random.Random(seed), max(n_chars, 2_000) + 2)))
        first = rng.randrange(len(self._books))
        order = [*self._books[first:], *self._books[:first]]
        chosen: list[str] = []
        for book in order:
            chosen.append(book.text)
            if sum(map(len, chosen)) >= n_chars:
                break
        return order[0] if len(chosen) == 1 else Prose.of("\n\n".join(chosen))

    def sample(self, n_chars: int = 20_000) -> str:
        """A piece of it, to see how many characters make a token."""
        return self.draw(random.Random(0), n_chars).text[:n_chars]


def _read(folder: Path) -> dict[str, str]:
    """Texts of the .txt files of a folder by name, line ends made uniform."""
    if not folder.is_dir():
        raise DocumentError(f"{str(folder)!r} is not a folder; --text takes a folder of .txt files.")
    try:
        files = {path.stem: path.read_text(encoding="utf-8-sig") for path in sorted(folder.glob("*.txt"))}
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"A .txt file of {str(folder)!r} cannot be read as UTF-8: {error}.") from None
    return {name: text.replace("\r\n", "\n").strip() for name, text in files.items() if text.strip()}


def _side(folder: Path, files: Mapping[str, str], split: Split) -> list[str]:
    """Texts of a split; as printed and with the lines of a paragraph joined."""
    held = any(name in HELD_OUT for name in files)
    chosen = []
    for name, text in files.items():
        is_test = name in HELD_OUT if held else zlib.crc32(text.encode()) % 2 == 1
        if is_test == (split == "test"):
            chosen.append(text)
    if not chosen:
        raise DocumentError(
            f"{str(folder)!r} has no {split} documents among its {len(files)} .txt files; a hash of each file decides which "
            "side it is on, so add more."
        )
    return [*chosen, *map(unwrap, chosen)]
