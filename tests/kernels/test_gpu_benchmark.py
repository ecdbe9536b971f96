"""The GPU benchmark goes through, in small and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.__main__ import main


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
