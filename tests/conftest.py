"""What tests of several parts share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COOKBOOK = Path(__file__).parents[1] / "cookbook"


@pytest.fixture
def run_notebook(tmp_path: Path) -> Callable[[str], Any]:
    """Runs a notebook of the cookbook from top to bottom, in an empty folder; an error in a cell is the test's."""
    import nbclient
    import nbformat

    def run(name: str) -> Any:
        notebook = nbformat.read(COOKBOOK / f"{name}.ipynb", as_version=4)
        kept = answers(notebook)
        nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
        assert answers(notebook) == kept, "run the notebook again and keep what it prints now"
        return notebook

    return run


def answers(notebook: Any) -> list[str]:
    """The sentences that a notebook prints, each on a line of its own; what is measured stands on other lines."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    outputs = ([output for output in cell.outputs if output.get("name") != "stderr"] for cell in cells)
    texts = "\n".join("".join(map(_text, cell)) for cell in outputs)
    lines = (line.partition("(expected")[0].strip("[]()', ") for line in texts.splitlines())
    return [line for line in lines if re.fullmatch(r"[A-Z][^'\"|]*\.", line)]


def _text(output: Any) -> str:
    """What an output shows as text; what is printed bit by bit comes in several outputs."""
    return str(output.get("text") or f"\n{output.get('data', {}).get('text/plain', '')}\n")
