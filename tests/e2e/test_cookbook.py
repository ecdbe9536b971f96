"""The notebooks about the memory run from top to bottom, and come with small pictures."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

COOKBOOK = Path(__file__).parents[2] / "cookbook"
PICTURES = {"04_what_the_memory_looked_at": 2, "05_choosing_the_memory": 2}


def pictures(notebook: Any) -> list[bytes]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("name", PICTURES)
def test_notebook(name: str, run_notebook: Callable[[str], Any]) -> None:
    notebook = run_notebook(name)
    for cell in notebook.cells:  # progress bars and notices of the libraries
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    assert len(pictures(notebook)) == PICTURES[name]


@pytest.mark.parametrize("name", PICTURES)
def test_kept_outputs(name: str) -> None:
    kept = pictures(nbformat.read(COOKBOOK / f"{name}.ipynb", as_version=4))
    assert len(kept) == PICTURES[name]
    assert max(map(len, kept)) < 80_000
