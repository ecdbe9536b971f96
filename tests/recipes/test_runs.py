"""Whole runs of the recipe, cut to a step or two a phase."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qllm_runtime.samples import story
from recipes import train
from recipes.evaluate import MODELS

Command = Callable[..., None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line on a small text and network, with short steps; a tokenizer is there already."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tale.txt").write_text("\n\n".join(story(random.Random(5), 20_000)), encoding="utf-8")
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    shutil.copy(MODELS / "reader" / "tokenizer.json", tmp_path / "out" / "tokenizer")
    monkeypatch.setattr(train, "STAGES", {"cpu": dict.fromkeys(train.SHARES, ((1.0, 256, 2, 0.3),))})
    monkeypatch.setattr(train, "quick_check", lambda *_: {"all": 0.5})
    monkeypatch.setattr(train, "CHECK_EVERY_S", 0.0)

    def run(*options: str) -> None:
        train.main(["--text", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--minutes", "0.002", *options])

    return run


def test_every_phase_as_a_gpu_runs_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_casts: Any
) -> None:
    monkeypatch.setattr("recipes.model.takes_whole", lambda _: True)
    monkeypatch.setattr(train, "CLAMP_SHARE", dict.fromkeys(train.SHARES, 1.0))
    monkeypatch.setattr(train, "MAX_POSITIONS", {"cpu": 2048})
    with cuda_casts:
        command("--size", "large", "--processes", "1")
    for name in ("reader", "reader-plain"):
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert config["max_position_embeddings"] == 2048
        assert config["num_hidden_layers"] == 8
        assert json.loads((tmp_path / "out" / name / "tokenizer_config.json").read_text())["model_max_length"] == 2048
    assert (tmp_path / "out" / "curve.png").exists()


def test_a_run_goes_on_where_it_was(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command()
    first = torch.load(tmp_path / "out" / "reader.pt", weights_only=True)
    assert first["lookup"]
    assert first["mean"][1] > 0
    run = train.Run("reader", train.Identity(**first["run"]), {"tale": "It rained. " * 500}, tmp_path / "out")
    assert run.step == first["step"]
    assert run.mean == first["mean"]
    assert run.lookup is not None
    assert run.lookup.banks.keys() == first["lookup"].keys()
    monkeypatch.setattr(train.Run, "train_step", lambda *_: pytest.fail("the phases had ended"))
    command()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--minutes", "0.001"), "minutes 0.002 there, minutes 0.001 here. Give the minutes that it was begun with"),
        (("--size", "large"), "size small there, size large here"),
        (("--device", "cuda"), "device cpu there, device cuda here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    command: Command, options: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--phase", "base")
    with pytest.raises(SystemExit):
        command("--phase", "base", *options)
    assert named in capsys.readouterr().err


def test_a_checkpoint_of_another_text_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--phase", "base")
    (tmp_path / "text" / "more.txt").write_text("Another book.", encoding="utf-8")
    with pytest.raises(SystemExit):
        command("--phase", "trunk")
    assert "base.pt is of another run: text " in capsys.readouterr().err
    (tmp_path / "text" / "more.txt").unlink()
    command("--phase", "trunk", "--minutes", "0.001")  # only its own phase has to have had the same time


def test_a_checkpoint_that_does_not_name_its_run_is_taken(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--phase", "base")
    path = tmp_path / "out" / "base.pt"
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k not in ("run", "mean", "lookup")}, path)
    command("--phase", "base")
    assert "does not say which run wrote it" in capsys.readouterr().out


def test_what_is_missing_is_named_before_anything_is_made(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("--phase", "reader")
    assert "trunk.pt to go on from; run --phase trunk first" in capsys.readouterr().err
    (tmp_path / "text" / "tale.txt").unlink()
    with pytest.raises(SystemExit):
        command()
    assert "give a folder of .txt files" in capsys.readouterr().err
