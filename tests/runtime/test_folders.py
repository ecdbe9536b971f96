"""Folders as documents."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qllm_runtime.errors import DocumentError
from qllm_runtime.folders import load_folder
from tests.office import epub, word


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


def test_word_files_and_books_are_read(tmp_path: Path) -> None:
    write(
        tmp_path, a_docx=word("The rent is 900."), b_epub=epub("Call me Ishmael."), c_txt="seen", d_odt=word("x")[:90]
    )
    with pytest.warns(UserWarning, match=r"1 of 4 files .*d\.odt. is a damaged zip archive"):
        documents = load_folder(tmp_path)
    assert [(d.title, d.text) for d in documents] == [
        ("a.docx", "The rent is 900."),
        ("b.epub", "Call me Ishmael."),
        ("c.txt", "seen"),
    ]


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
    with pytest.warns(UserWarning, match=r"4 of 5 files .*b\.bin. is binary.*e\.txt. holds nothing but.* And 1 more"):
        documents = load_folder(tmp_path)
    assert [d.title for d in documents] == ["a.txt"]


def test_empty_files_are_passed_over(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path, a_py="seen", pkg__b_py="")
    assert [d.title for d in load_folder(tmp_path)] == ["a.py"]
    assert not recwarn.list


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no text, HTML, PDF, Word or EPUB file in the directory"):
        load_folder(tmp_path)
    write(tmp_path, b_bin=b"\0\1")
    with pytest.raises(DocumentError, match=r"in the directory .*: .*b\.bin.* binary"):
        load_folder(tmp_path)


def test_links_that_lead_nowhere_or_round_in_circles(tmp_path: Path) -> None:
    write(tmp_path, a_txt="seen")
    os.symlink(tmp_path / "none", tmp_path / "broken")
    os.symlink(tmp_path, tmp_path / "circle")
    assert [d.title for d in load_folder(tmp_path)] == ["a.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
@pytest.mark.parametrize("checkout", [False, True])
def test_names_that_are_not_utf8(tmp_path: Path, checkout: bool) -> None:
    if checkout:
        git(tmp_path, "init", "-q")
    write(tmp_path, a_txt="seen")
    name = os.fsdecode(b"n\xff.txt")
    (tmp_path / name).write_text("seen")
    documents = load_folder(tmp_path)
    assert [d.title for d in documents] == ["a.txt", "n\ufffd.txt"]
    assert documents[1].metadata["source"] == str(tmp_path / name)


def git(folder: Path, *arguments: str) -> None:
    settings = ["user.name=a", "user.email=a@b.c", "protocol.file.allow=always", "init.defaultBranch=main"]
    options = [word for setting in settings for word in ("-c", setting)]
    subprocess.run(["git", "-C", str(folder), *options, *arguments], check=True, capture_output=True)


def repository(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q")
    write(folder, **files)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "x")
    return folder


def test_files_in_conflict_come_once(tmp_path: Path) -> None:
    repository(tmp_path, a_txt="one")
    git(tmp_path, "checkout", "-q", "-b", "other")
    write(tmp_path, a_txt="two")
    git(tmp_path, "commit", "-q", "-a", "-m", "x")
    git(tmp_path, "checkout", "-q", "main")
    write(tmp_path, a_txt="three")
    git(tmp_path, "commit", "-q", "-a", "-m", "x")
    with pytest.raises(subprocess.CalledProcessError):
        git(tmp_path, "merge", "other")
    (document,) = load_folder(tmp_path)
    assert document.title == "a.txt" and "<<<<<<<" in document.text


def test_checkouts_inside_of_a_checkout(tmp_path: Path) -> None:
    library = repository(tmp_path / "library", l_txt="seen", sub__m_txt="seen", _gitignore="*.log\n")
    top = repository(tmp_path / "top", a_txt="seen")
    git(top, "submodule", "add", "-q", str(library), "deps/module")
    repository(top / "clone", n_txt="seen", _hidden="seen")
    repository(top / "clone" / "inner", o_txt="seen")
    write(top, deps__module__x_log="no", clone__p_txt="seen, not tracked yet")
    os.symlink(library, top / "link")
    documents = load_folder(top)
    assert [d.title for d in documents] == [
        ".gitmodules",
        "a.txt",
        "clone/.hidden",
        "clone/inner/o.txt",
        "clone/n.txt",
        "clone/p.txt",
        "deps/module/.gitignore",
        "deps/module/l.txt",
        "deps/module/sub/m.txt",
    ]
    assert documents[-1].metadata["source"] == str(top / "deps/module/sub/m.txt")


def test_nothing_but_a_clone(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    git(top, "init", "-q")
    repository(top / "clone", n_txt="seen")
    assert [d.title for d in load_folder(top)] == ["clone/n.txt"]


def test_a_submodule_whose_repository_is_gone(tmp_path: Path) -> None:
    library = repository(tmp_path / "library", l_txt="seen")
    top = repository(tmp_path / "top", a_txt="seen")
    git(top, "submodule", "add", "-q", str(library), "module")
    (top / "module" / ".git").write_text("gitdir: ../nowhere\n")
    assert [d.title for d in load_folder(top)][-1] == "module/l.txt"
    (top / "module" / ".git").unlink()  # not checked out
    (top / "module" / "l.txt").unlink()
    assert [d.title for d in load_folder(top)] == [".gitmodules", "a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="the script is one of a shell")
def test_the_configuration_of_a_folder_runs_nothing(tmp_path: Path) -> None:
    top = repository(tmp_path / "top", a_txt="seen", deep__b_txt="seen")
    inner = repository(top / "inner", c_txt="seen")
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    for checkout in (top, inner):
        git(checkout, "config", "core.fsmonitor", str(script))
    assert [d.title for d in load_folder(top)] == ["a.txt", "deep/b.txt", "inner/c.txt"]
    assert not (tmp_path / "ran").exists()


def test_the_repository_of_the_environment_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = repository(tmp_path / "top", a_txt="seen")
    other = repository(tmp_path / "other", n_txt="no") / ".git"
    (other / "info" / "exclude").write_text("*.txt\n")
    monkeypatch.setenv("GIT_DIR", str(other))
    assert [d.title for d in load_folder(top)] == ["a.txt"]


def test_a_folder_whose_files_are_all_ignored_holds_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    write(tmp_path, kept__a_txt="no", kept___gitignore="*\n")
    with pytest.raises(DocumentError, match="There is no text"):
        load_folder(tmp_path / "kept")
