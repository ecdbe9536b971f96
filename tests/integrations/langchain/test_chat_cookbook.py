"""The LangChain notebooks of the cookbook run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

COOKBOOK = Path(__file__).parents[3] / "cookbook"


@pytest.mark.parametrize("name", ["01_ask_a_book_with_langchain", "02_chains_structured_output_and_an_agent"])
def test_notebook(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(COOKBOOK / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
