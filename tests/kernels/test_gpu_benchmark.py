"""The GPU benchmark goes through, in small and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from benchmarks.gpu.__main__ import Report, main
from qllm_kernels import dispatch


def test_tiny(tmp_path):
    main(output=tmp_path / "gpu.json", device="cpu", tiny=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["ok"] for found in report["operations"].values() for row in found["errors"].values())
    for rows in report["agreement"].values():
        assert 1e-4 < rows.pop("offloaded_fp8")["apart"] < 0.1
        assert all(row["apart"] < 1e-4 and row["ok"] for row in rows.values())
    assert report["models"].keys() == report["operations"].keys()
    assert not any("failed" in row for rows in report["models"].values() for row in rows.values())


def test_what_a_machine_lacks_is_said_in_one_line(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks/gpu/run.sh"
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare), "PYTHONPATH": ""}
    run = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert not run.stdout
    (line,) = run.stderr.splitlines()
    assert "has no torch transformers typer" in line
    assert "benchmarks/gpu/wheels" in line


def test_one_failure_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(dispatch, "query_prefix", broken)
    with pytest.raises(typer.Exit):
        main(output=tmp_path / "gpu.json", device="cpu", tiny=True, only="operations", began=1.0)
    report = json.loads((tmp_path / "gpu.json").read_text())
    for found in report["operations"].values():
        for rows in found.values():
            assert rows.pop("prefix sums")["failed"] == "RuntimeError: an illegal memory access"
            assert not any("failed" in row for row in rows.values())
    assert "prefix sums" in capsys.readouterr().out.splitlines()[-1]


def test_parts_of_a_run_share_a_file(tmp_path):
    first = Report(tmp_path / "gpu.json", 7.0)
    first.add({"us": 1.0}, "operations", "8B", "speeds", "copy")
    second = Report(tmp_path / "gpu.json", 7.0)
    second.add({"apart": 0.5, "ok": False}, "agreement", "8B", "graph")
    assert second.content["operations"]["8B"]["speeds"]["copy"] == {"us": 1.0}
    assert second.wrong() == ["8B graph"]
    assert Report(tmp_path / "gpu.json", 8.0).content == {"began": 8.0}
