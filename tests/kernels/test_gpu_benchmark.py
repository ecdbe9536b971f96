"""The GPU benchmark goes through, in small and on the CPU; what needs a GPU is stood in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import models, timing
from benchmarks.gpu.__main__ import LENGTHS, PARTS, main, missing_for_triton
from benchmarks.gpu.report import BROKEN, Report
from qllm_kernels import dispatch
from qllm_runtime.config import CANDIDATES, MemoryConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/run.sh"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_tiny(tmp_path):
    main(output=tmp_path / "gpu.json", device="cpu", tiny=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["ok"] for found in report["operations"].values() for row in found["errors"].values())
    for found in report["operations"].values():
        assert all(row["us"] > 0 for row in found["speeds"].values())
        fetch = found["speeds"]["pages from the host"]
        assert fetch["share"] == pytest.approx(fetch["gb_s"] / report["ceilings"]["from_host_gb_s"])
    for rows in report["agreement"].values():
        assert 1e-4 < rows.pop("offloaded_fp8")["apart"] < 0.1
        assert all(row["apart"] < 1e-4 and row["ok"] for row in rows.values())
    assert report["models"].keys() == report["operations"].keys()
    for rows in report["models"].values():
        assert not any("failed" in row for row in rows.values())
        assert rows["offloaded_fp8@300"]["question"] and rows["offloaded@300"]["first_prefill_s"] > 0
        assert rows["sdpa@700"]["tokens_per_call"] == 700


def test_what_a_machine_lacks_is_said_in_one_line(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare), "PYTHONPATH": ""}
    run = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert not run.stdout
    (line,) = run.stderr.splitlines()
    assert "has no torch transformers typer" in line
    assert "benchmarks/gpu/wheels" in line


STAND_IN = """#!/bin/sh
test "$1" = - && exit 0
echo "$*" >> "$LOG"
case "$*" in *"$STOPS"*--began*) test "$(grep -c -- "$STOPS.*--began" "$LOG")" -gt 2 || exit "$CODE" ;; esac
"""


@pytest.mark.parametrize(("code", "times", "goes_on"), [(139, 3, True), (BROKEN, 3, True), (1, 1, True), (2, 1, False)])
def test_a_part_that_stops_begins_anew(tmp_path, code, times, goes_on):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    stops = "ceilings" if code == 2 else "choice:Llama-3-8B"
    environment = {**os.environ, "PYTHON": str(python), "LOG": str(log), "CODE": str(code), "STOPS": stops}
    run = subprocess.run(["bash", str(SCRIPT), "--tiny"], env=environment, capture_output=True, text=True)
    calls = [line.split() for line in log.read_text().splitlines()]
    measured = [call[call.index("--only") + 1] for call in calls if "--began" in call]
    assert all("--tiny" in call for call in calls)
    assert measured.count(stops) == times
    assert set(measured) == (set(PARTS) if goes_on else {stops})
    assert run.returncode == (0 if times > 1 else code)
    prepared = [call for call in calls if "--short" in call]
    assert len(prepared) == (len(PARTS) - 1 if goes_on else 0)


def test_one_failure_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(dispatch, "query_prefix", broken)
    with pytest.raises(typer.Exit):
        main(output=tmp_path / "gpu.json", device="cpu", tiny=True, only="memory:Qwen2.5-1.5B", began=1.0)
    report = json.loads((tmp_path / "gpu.json").read_text())
    for found in report["operations"].values():
        for rows in found.values():
            assert rows.pop("prefix sums")["failed"] == "RuntimeError: an illegal memory access"
            assert not any("failed" in row for row in rows.values())
    assert "prefix sums" in capsys.readouterr().out.splitlines()[-1]


def test_a_device_that_answers_no_more_ends_the_process_behind_the_row(tmp_path, monkeypatch):
    """The next process goes on with the row that follows."""
    measured: list[str] = []

    def gone(device: torch.device) -> None:
        if measured == ["one"]:
            raise RuntimeError("an illegal memory access")

    def rows(report: Report) -> None:
        for name in ("one", "two"):
            report.measure(lambda name=name: measured.append(name) or {"us": 1.0}, GPU, "models", "8B", name)

    monkeypatch.setattr(timing, "synchronize", gone)
    with pytest.raises(typer.Exit) as stopped:
        rows(Report(tmp_path / "gpu.json", 7.0))
    assert stopped.value.exit_code == BROKEN
    report = Report(tmp_path / "gpu.json", 7.0)
    rows(report)
    assert measured == ["one", "two"]
    assert report.wrong() == ["8B one"]
    assert report.content["models"]["8B"]["two"] == {"us": 1.0}


def test_a_row_that_ends_the_process_is_told(tmp_path):
    class Killed(BaseException):
        pass

    def measure() -> dict[str, object]:
        raise Killed

    with pytest.raises(Killed):
        Report(tmp_path / "gpu.json", 7.0).measure(measure, CPU, "agreement", "8B", "graph")
    report = Report(tmp_path / "gpu.json", 7.0)
    assert "process ended" in report.measure(measure, CPU, "agreement", "8B", "graph")["failed"]
    assert report.wrong() == ["8B graph"]


def test_time_on_the_device_is_that_of_replays(monkeypatch):
    calls: list[int] = []
    replays: list[int] = []
    recorded: list[int] = []

    def record(turns):
        recorded.append(len(turns))
        return lambda: replays.append(1)

    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_recorded", record)
    row = timing.spent([lambda n=n: calls.append(n) for n in range(3)], GPU, least=7)
    assert row.keys() == {"us", "eager_us"} and recorded == [7]
    assert calls[:7] == [0, 1, 2, 0, 1, 2, 0] and len(replays) == 1 + 3 * timing._REPLAYS
    assert timing.spent([lambda: None], CPU).keys() == {"us"}


def test_what_cannot_be_recorded_says_so(monkeypatch):
    def refuse(turns):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_recorded", refuse)
    row = timing.spent([lambda: None], GPU)
    assert row["us"] == row["eager_us"]
    assert row["not_recorded"] == "RuntimeError: operation not permitted"


def test_copies_exceed_the_cache(monkeypatch):
    free = [40 * 2**30]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=60 * 2**20))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2**37))

    def make() -> int:
        free[0] -= 2**30
        return 0

    assert len(timing.copies(make, 60 * 2**20, GPU)) == 4
    assert len(timing.copies(make, 10**7, GPU)) == 20  # until what is to be left free is
    free[0] = 2**40
    assert len(timing.copies(make, 10**7, GPU)) == 26
    assert len(timing.copies(make, 100, GPU)) == 64
    assert len(timing.copies(make, 100, CPU)) == 1


@pytest.mark.parametrize("name", LENGTHS)
def test_a_warm_up_ends_as_the_text_does(name):
    model = SimpleNamespace(config=models.CONFIGS[name]())
    config = MemoryConfig.for_model(model.config.max_position_embeddings)
    for length in LENGTHS[name]:
        warm = models.warm_up_length(model, length)
        assert warm == length or (length - warm) % config.chunk_size == 0
        if warm < length:  # as many candidates as there ever are
            assert warm - config.n_local - config.n_init > CANDIDATES * config.topk * config.block_size


def test_what_triton_needs_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    assert "gcc or clang" in missing_for_triton()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(command.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in missing_for_triton()
    (tmp_path / "Python.h").touch()
    assert missing_for_triton() is None
    monkeypatch.delenv("CC")
    with pytest.raises(typer.Exit) as stopped:
        main(output=tmp_path / "gpu.json", device="cuda")
    assert stopped.value.exit_code == 2


def test_parts_of_a_run_share_a_file(tmp_path):
    first = Report(tmp_path / "gpu.json", 7.0)
    first.add({"us": 1.0}, "operations", "8B", "speeds", "copy")
    second = Report(tmp_path / "gpu.json", 7.0)
    second.add({"apart": 0.5, "ok": False}, "agreement", "8B", "graph")
    assert second.content["operations"]["8B"]["speeds"]["copy"] == {"us": 1.0}
    assert second.wrong() == ["8B graph"]
    assert Report(tmp_path / "gpu.json", 8.0).content == {"began": 8.0}
