"""What tests of several parts share."""

from __future__ import annotations

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
        nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
        return notebook

    return run
