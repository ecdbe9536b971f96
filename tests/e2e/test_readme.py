"""Every Python snippet of README.md runs as printed; the snippets of one section share their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ANSWERS = {
    "qllm-integrations": ("The pass key is 71432.",),
    "LlamaIndex": (
        "The mayor of Ashford is Greta Holt.", "Tabitha Moor lives in Elm Street.", "The bell of the chapel is green.",
        "The key of the chapel is in the drawer.",
    ),
}  # fmt: skip


def sections() -> dict[str, list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE):
        snippets = re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
        if snippets:
            found[part.splitlines()[0].lstrip("# ")] = snippets
    return found


@pytest.mark.parametrize("title", sections())
def test_snippets_run(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for number, snippet in enumerate(sections()[title]):
        exec(compile(snippet, f"README.md: {title}, snippet {number + 1}", "exec"), names)
    printed = capsys.readouterr().out
    for answer in ANSWERS.get(title, ()):
        assert answer in printed


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / link).exists()]
    assert not missing


def test_commands_exist() -> None:
    from typer.testing import CliRunner

    from qllm_runtime.commands import app

    out = CliRunner().invoke(app, ["--help"]).output
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"qllm (ask|chat|models|bench)\b", text))
    assert used
    assert all(command in out for command in used)
