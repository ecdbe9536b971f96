"""Thousands of relations, each stated and asked for in several ways: the files ``wordings/*.txt``.

The files hold one relation after the other::

    == person_home: person -> town
    S: {S} settled for good in {v}.
    Q: Where does {s} live?
    N: the town where {s} lives
    P: In which towns has {s} lived?

``S`` are statements, ``Q`` questions, ``N`` a noun phrase that stands for the value (two hops are made of it) and ``P``
questions for all of several values. A restated answer quotes the statements; relations that may stand in JSON say in ``A``,
and for several values in ``PA``, how it is put in words. ``{s}`` is the subject, ``{v}`` the value, a capital letter asks
for a capital, and any other slot is a kind of ``kinds.py`` drawn once per fact. About an eighth of the relations, chosen by a
hash of their names, is asked in evaluation only.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qllm_runtime.samples import article

FOLDER = Path(__file__).parent / "wordings"
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Wording:
    """One relation as written out; the fields are those of the file."""

    name: str
    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    noun: str = ""
    plural: tuple[str, ...] = ()
    answer: str = ""
    plural_answer: str = ""

    @property
    def cluster(self) -> str:
        """Relations of one cluster are told of the same subject and easily confused; others are their own cluster."""
        return self.name.partition(".")[0]

    @property
    def held_out(self) -> bool:
        """Whether it is asked in evaluation only."""
        return zlib.crc32(self.cluster.encode()) % 8 == 0

    @property
    def slots(self) -> list[str]:
        """The slots that tell one question of the relation from another."""
        return sorted({m.lower() for q in self.questions for m in SLOT.findall(q)} | {"s"})


def parse(text: str) -> list[Wording]:
    """The relations of a file."""
    found = []
    for block in re.split(r"^== ", text, flags=re.M)[1:]:
        head, *lines = [line for line in block.splitlines() if line.strip()]
        name, subject, value = re.fullmatch(r"([\w.]+): (\w+) -> (\w+)", head.strip()).groups()  # type: ignore[union-attr]
        rows: dict[str, list[str]] = {}
        for line in lines:
            tag, _, words = line.partition(": ")
            rows.setdefault(tag, []).append(words.strip())
        one = {tag: "".join(rows.get(tag, ())) for tag in ("N", "A", "PA")}
        several = tuple(rows.get("P", ()))
        found.append(
            Wording(name, subject, value, tuple(rows["S"]), tuple(rows["Q"]), one["N"], several, one["A"], one["PA"])
        )
    return found


@cache
def wordings(evaluation: bool) -> tuple[Wording, ...]:
    """All relations of one side: those of training, or those kept for evaluation; no statement is on both."""
    read = [w for path in sorted(FOLDER.glob("*.txt")) for w in parse(path.read_text(encoding="utf-8"))]
    kept = {statement for w in read if w.held_out for statement in w.statements}
    if evaluation:
        return tuple(w for w in read if w.held_out)
    return tuple(replace(w, statements=tuple(s for s in w.statements if s not in kept)) for w in read if not w.held_out)


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Fill a template; a capital slot asks for a capital, and "a" agrees with what follows it."""

    def put(match: re.Match[str]) -> str:
        before, slot = match[1] or "", match[2]
        part = parts.get(slot.lower())
        if part is None:
            return match[0]
        part = part[:1].upper() + part[1:] if slot[0].isupper() else part
        joined = f"{article(part)} {part}" if before else part
        return joined[0].upper() + joined[1:] if before[:1].isupper() else joined

    return re.sub(r"(\b[Aa]n? )?\{(\w+)\}", put, template)
