"""`qllm bench speed`: processes, ratios, growth."""

import json
import subprocess
from dataclasses import asdict

import pytest

from qllm_bench import speed
from qllm_bench.speed_measure import SMALL_MEMORY, Measurement, measure
from qllm_runtime import cli
from qllm_runtime.config import MemoryConfig


def measurement(policy, **changes):
    memory = speed.policy_memory(MemoryConfig(**SMALL_MEMORY), policy).model_dump()
    return Measurement(**{
        "policy": policy, "length": 700, "model": "random", "device": "cpu", "dtype": "auto", "memory": memory, "steps": 2,
        "threads": 1, **changes,
    })  # fmt: skip


def test_from_command_to_figures(tmp_path, capsys):
    command = ["bench", "speed", "--lengths", "512", "--policy", "qllm,sdpa", "--steps", "2", "--out", str(tmp_path)]
    assert cli.run(command) == 0
    assert "| 512 | qllm |" in capsys.readouterr().out
    ours, stock = json.loads((tmp_path / "speed.json").read_text())["cells"]
    assert (ours["policy"], stock["policy"]) == ("qllm", "sdpa")
    for cell in (ours, stock):
        assert all(cell[column] > 0 for column in speed.COLUMNS)
        assert cell["peak_mib"] > 100
    assert ours["ratio"]["prefill_s"] == pytest.approx(stock["prefill_s"] / ours["prefill_s"], abs=0.02)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_would_measure_nothing_is_refused(tmp_path, capsys):
    command = ["bench", "speed", "--policy", "sdpa", "--lengths", "4k", "--sdpa-up-to", "1k"]
    assert cli.run([*command, "--out", str(tmp_path / "out")]) == 2
    assert "nothing would be measured" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["qllm", "infllm", "streaming", "sdpa"])
def test_every_policy_is_measured(policy):
    found = measure(measurement(policy))
    assert found["prefill_s"] > 0 and found["decode_ms"] > 0 and found["second_ms"] > 0
    config = MemoryConfig(**measurement(policy).memory)
    keys_and_values = 2 * 4 * 4 * 32 * 4 / 2**20  # both, layers, heads, width, bytes
    held = 699 if policy == "sdpa" else min(699, config.n_local)
    assert found["held_mib"] >= keys_and_values * held * 0.95


def row(policy, tokens, seconds, repeat=0, **more):
    columns = dict.fromkeys(speed.COLUMNS, seconds)
    return {"policy": policy, "tokens": tokens, "repeat": repeat, **columns, **more}


def test_ratios_growth_and_medians():
    rows = [
        *(row("qllm", 1024, seconds, n) for n, seconds in enumerate((2.0, 1.0, 9.0))),
        row("sdpa", 1024, 8.0), row("qllm", 4096, 10.0),
        {"policy": "sdpa", "tokens": 4096, "repeat": 0, "failed": "out of memory"},
    ]  # fmt: skip
    short, stock, long, failed = speed.summarise(rows)
    assert short["prefill_s"] == 2.0 and short["repeats"] == 3
    assert set(short["ratio"].values()) == {4.0}
    assert "ratio" not in stock and "growth" not in short
    assert (long["growth"], long["longer"]) == (5.0, 4.0)
    assert "ratio" not in long and failed["failed"] == "out of memory"


def test_a_measurement_that_fails_says_why(monkeypatch):
    asked = measurement("qllm")
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: no such thing\n")
    monkeypatch.setattr(speed.subprocess, "run", lambda *a, **k: broken)
    with pytest.raises(speed.MeasurementError, match="qllm at 700 tokens failed: ValueError: no such thing"):
        speed._measure(asked, lambda *_: None)
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(speed.subprocess, "run", lambda *a, **k: killed)
    assert speed._measure(asked, lambda *_: None) == {"failed": "out of memory"}
    assert asdict(asked)["policy"] == "qllm"
