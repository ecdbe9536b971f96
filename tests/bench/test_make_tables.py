"""`python -m benchmarks.make_tables`: its commands are valid, and its steps' rows come together."""

import json

import pytest

from benchmarks import make_tables
from qllm_runtime.cli import run


@pytest.mark.parametrize("step", make_tables.STEPS, ids=lambda step: step.name)
def test_every_step_is_a_valid_command(step, tmp_path, capsys):
    wrong = "--split" if step.reads_books else "--order"
    assert run(["bench", *step.command.split(), "--out", str(tmp_path / "out"), wrong, "nowhere"]) == 2
    assert f"Unknown {wrong[2:]} nowhere" in capsys.readouterr().err


def test_steps_have_folders_of_their_own():
    names = [step.name for step in make_tables.STEPS]
    assert len(set(names)) == len(names)


def write(path, subject, keys, score=1.0, cut=""):
    path.parent.mkdir(parents=True)
    lines = [{"subject": {"trained_length": 512, "seed": subject}}, {"run": {"date": path.parent.name}}]
    for key in keys:
        policy, order, tokens, _, _ = key.split("/")
        labels = {"policy": policy, "order": order, "tokens": int(tokens), "depth": 0.0, "family": "code"}
        lines.append({"key": key, **labels, "score": score})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def test_steps_of_a_table_are_put_together(tmp_path, monkeypatch):
    document = tmp_path / "results.md"
    document.write_text("<!-- table: books/needle.md -->\n<!-- end -->\n")
    monkeypatch.setattr(make_tables, "DOCUMENT", document)
    monkeypatch.setattr(make_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(make_tables, "fill", lambda text: text + "filled")
    write(tmp_path / "work/window/needle.jsonl", 0, ["full/last/512/0/0"])
    write(tmp_path / "work/16k-once/needle.jsonl", 0, ["full/last/512/0/0", "qllm/last/4096/0/0"], 0.0, '{"key": "qll')
    write(tmp_path / "work/stories/needle.jsonl", 1, ["qllm/last/1024/0/0"])
    make_tables.collect("books", "needle", tmp_path / "work")
    made = tmp_path / "results/books"
    rows = [row for row in map(json.loads, (made / "needle.jsonl").read_text().splitlines()) if "key" in row]
    assert [(row["key"], row["score"]) for row in rows] == [("full/last/512/0/0", 1.0), ("qllm/last/4096/0/0", 0.0)]
    assert "| qllm | last | - | 0.00" in (made / "needle.md").read_text()
    assert document.read_text().endswith("filled")
    write(tmp_path / "work/1M-once/needle.jsonl", 7, ["qllm/last/1048576/0/0"])
    with pytest.raises(ValueError, match="another subject"):
        make_tables.collect("books", "needle", tmp_path / "work")
