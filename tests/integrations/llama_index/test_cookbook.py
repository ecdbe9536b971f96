"""The LlamaIndex notebook of the cookbook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

from qllm_runtime import loading

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[3] / "cookbook" / "03_llama_index_query_and_chat_engines.ipynb"


@pytest.mark.skipif(not Path(loading.locate("reader")).exists(), reason="the reader is not here")
def test_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
