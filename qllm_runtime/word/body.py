"""Paragraphs, tables and notes of a Word file, in the order in which they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qllm_runtime.word.names import child, is_on, number, value, w
from qllm_runtime.word.numbering import Numbering
from qllm_runtime.word.paragraphs import Paragraph, parts

_PARAGRAPH, _TABLE = w("p"), w("tbl")
_BLOCKS = frozenset((_PARAGRAPH, _TABLE, w("altChunk"), w("subDoc")))
_MOST_COLUMNS = 63  # that Word makes


@dataclass(frozen=True)
class _Block:
    """A piece of text on lines of its own."""

    text: str
    in_list: bool = False
    is_paragraph: bool = False


class Body:
    """Reads the body of a document.

    Args:
        numbering: The lists of the document.
        notes: Notes by kind ("footnote", "endnote") and id.
        included: Called with `w:altChunk` or `w:subDoc`; returns the text of the file it stands for.
    """

    def __init__(self, numbering: Numbering, notes: dict[str, dict[str, Any]], included: Callable[[Any], str]) -> None:
        self._numbering = numbering
        self._notes = notes
        self._included = included
        self._cited: dict[str, int] = dict.fromkeys(notes, 0)
        self._due: list[tuple[str, Any]] = []  # notes that follow the present block, with their marks

    def text(self, body: Any) -> str:
        """The text of `w:body`; notes follow the paragraph or table that refers to them."""
        blocks: list[_Block] = []
        for block in self._blocks(body):
            blocks.append(block)
            while self._due:
                mark, note = self._due.pop(0)
                blocks.append(_Block((mark + _joined(self._blocks(note))).rstrip()))
        return _joined(blocks)

    def _blocks(self, container: Any) -> Iterator[_Block]:
        lead, label_at = "", 0  # of paragraphs that run on into the next
        for element in _within(container, _BLOCKS):
            if element.tag == _PARAGRAPH:
                paragraph = Paragraph(element, self._cite)
                mark = child(element, "pPr", "rPr")
                deleted = any(child(mark, name) is not None for name in ("del", "moveFrom"))
                hidden = is_on(mark, "vanish")
                shown = not deleted and (paragraph.text or not hidden)
                label = self._numbering.label(element) if shown else None
                lead = lead[:label_at] + (label or "") + lead[label_at:] + paragraph.text
                if hidden:
                    label_at = len(lead)
                elif not deleted:
                    yield _Block(lead.strip("\n").rstrip(), label is not None, is_paragraph=True)
                    lead, label_at = "", 0
                for box in paragraph.boxes:
                    yield from self._blocks(box)
                continue
            yield _Block(lead.strip("\n").rstrip(), is_paragraph=True)  # text does not run on into a table
            lead, label_at = "", 0
            yield _Block(self._table(element) if element.tag == _TABLE else self._included(element))
        yield _Block(lead.strip("\n").rstrip(), is_paragraph=True)

    def _table(self, table: Any) -> str:
        """Rows on lines and cells between tabs; where a cell has lines of its own, every cell of its row begins one."""
        text, spaced = "", False
        for row in _within(table, (w("tr"),)):
            if child(row, "trPr", "del") is not None:
                continue
            cells = [""] * _columns(row, "trPr", "gridBefore")
            for cell in _within(row, (w("tc"),)):
                if child(cell, "tcPr", "cellDel") is None:
                    cells.append(self._cell(cell))
                    cells += [""] * (_columns(cell, "tcPr", "gridSpan") - 1)
            lines = any("\n" in cell for cell in cells)
            line = "\n".join(filter(None, cells)) if lines else "\t".join(cells).rstrip("\t")
            if line:
                text += ("\n\n" if lines or spaced else "\n") * bool(text) + line
                spaced = lines
        return text

    def _cell(self, cell: Any) -> str:
        blocks = [block for block in self._blocks(cell) if block.text.strip()]
        if len(blocks) == 1 and blocks[0].is_paragraph:
            return " ".join(blocks[0].text.split("\n"))
        return "\n".join(block.text for block in blocks)

    def _cite(self, kind: str, reference: Any) -> str:
        note = self._notes[kind].get(reference.get(w("id")))
        marked = reference.get(w("customMarkFollows")) in ("1", "true", "on")
        if not marked:
            self._cited[kind] += 1
        mark = "" if marked else f"[{'e' * (kind == 'endnote')}{self._cited[kind]}]"
        if note is not None:
            self._due.append((f"{mark} ".lstrip(), note))
        return mark


def _columns(element: Any, *path: str) -> int:
    return min(number(value(element, *path)), _MOST_COLUMNS)


def _within(container: Any, tags: Iterable[str]) -> Iterator[Any]:
    """Elements with one of these tags, looked for in wrappers, but not in one another."""
    for one in parts(container):
        if one.tag in tags:
            yield one
        else:
            yield from _within(one, tags)


def _joined(blocks: Iterable[_Block]) -> str:
    """Blocks with empty lines between them; what follows one another in a list, on lines."""
    text, in_list = "", False
    for block in blocks:
        if block.text.strip():
            text += ("\n" if in_list and block.in_list else "\n\n") * bool(text) + block.text
            in_list = block.in_list
    return text
