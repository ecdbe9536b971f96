"""The machine and the versions that results were made with."""

from __future__ import annotations

import os
import platform
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qllm_kernels
import qllm_runtime

_PACKAGES = ("qllm-integrations", "torch", "transformers", "tokenizers", "triton", "numpy")


def _cpu() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sources() -> list[Path]:
    """Files of the engine, its kernels, and what makes questions, prompts and scores."""
    here = Path(__file__).parent
    folders = (Path(qllm_runtime.__path__[0]), Path(qllm_kernels.__path__[0]), here / "questions", here / "published")
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".toml", ".txt")]


def _engine() -> str:
    """Eight hexadecimal digits that change with the source of the engine and of what makes questions."""
    crc = 0
    for path in _sources():
        crc = zlib.crc32(path.read_bytes(), crc)
    return f"{crc:08x}"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and a fingerprint of the engine for a report; ``device`` is the one measured on."""
    import torch

    hardware: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        place = torch.device(device)
        facts = torch.cuda.get_device_properties(place)
        hardware["gpu"] = facts.name
        hardware["gpu_memory_gib"] = round(facts.total_memory / 2**30, 1)
        hardware["cuda"] = torch.version.cuda
    return {"hardware": hardware, "versions": _versions(), "engine": _engine()}
