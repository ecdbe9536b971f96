"""The GPU benchmark goes through, in small and on the CPU."""

from __future__ import annotations

import json

from benchmarks.gpu.__main__ import main


def test_tiny(tmp_path):
    main(output=tmp_path / "gpu.json", device="cpu", tiny=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["ok"] for found in report["operations"].values() for row in found["errors"].values())
    assert report["models"].keys() == report["operations"].keys()
    assert not any("failed" in row for rows in report["models"].values() for row in rows.values())
