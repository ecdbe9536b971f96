"""Folders as documents."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qllm_runtime.errors import DocumentError
from qllm_runtime.folders import load_folder


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_in_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, b_py="two = 2\n", a__z_md="# One", c_html="<p>Three</p><script>no</script>")
    documents = load_folder(tmp_path)
    assert [d.title for d in documents] == ["a/z.md", "b.py", "c.html"]
    assert [d.text for d in documents] == ["# One", "two = 2\n", "Three"]
    assert [d.metadata["source"] for d in documents] == [str(tmp_path / d.title) for d in documents]


def test_hidden_files_are_left_out_outside_of_a_checkout(tmp_path: Path) -> None:
    write(tmp_path, a_txt="seen")
    (tmp_path / ".secret").write_text("no")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("no")
    assert [d.title for d in load_folder(tmp_path)] == ["a.txt"]


def test_what_git_ignores_is_left_out(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    write(tmp_path, sub__a_txt="seen", sub__b_log="no", sub__build__c_txt="no")
    (tmp_path / ".gitignore").write_text("*.log\nbuild/\n")
    assert [d.title for d in load_folder(tmp_path / "sub")] == ["a.txt"]
    assert [d.title for d in load_folder(tmp_path)] == [".gitignore", "sub/a.txt"]
    assert [d.title for d in load_folder(tmp_path / "sub" / "build")] == ["c.txt"]


def test_files_without_text_are_named_in_a_warning(tmp_path: Path) -> None:
    write(tmp_path, a_txt="seen", b_bin=b"\0\1", c_txt="", d_txt=b"\xff\xfe", e_txt=" ", f_zip=b"PK\x03\x04")
    with pytest.warns(UserWarning, match=r"5 of 6 files .*b\.bin. is binary.*c\.txt. is empty.* And 2 more"):
        documents = load_folder(tmp_path)
    assert [d.title for d in documents] == ["a.txt"]


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no text, HTML or PDF file in the directory"):
        load_folder(tmp_path)
    write(tmp_path, b_bin=b"\0\1")
    with pytest.raises(DocumentError, match=r"in the directory .*: .*b\.bin.* binary"):
        load_folder(tmp_path)


def test_links_that_lead_nowhere_or_round_in_circles(tmp_path: Path) -> None:
    write(tmp_path, a_txt="seen")
    os.symlink(tmp_path / "none", tmp_path / "broken")
    os.symlink(tmp_path, tmp_path / "circle")
    assert [d.title for d in load_folder(tmp_path)] == ["a.txt"]
