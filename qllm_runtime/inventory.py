"""`qllm models`: what is built in, and what a given model lacks."""

from __future__ import annotations

import json
from pathlib import Path

BUILTIN = {
    "reader": "finds facts in English prose; trained with an objective that knows about lookups",
    "reader-plain": "the same without that objective, for unbiased comparisons of policies",
}
#: Where they are, each in a folder of its name.
MODELS = Path(__file__).parent / "models"


def print_builtin() -> None:
    """One line per model that ships with the package."""
    print("Built in (English, runs on a CPU):")
    for name, purpose in BUILTIN.items():
        print(f"  {name:13} {_facts(MODELS / name)}; {purpose}")
    print("\nAny other decoder of transformers with rotary positions: --model FOLDER or a Hugging Face hub id.")
    print("`qllm models NAME` tells whether one is supported, from its configuration alone.")


def print_support(name: str) -> bool:
    """One line on a model; returns whether it is supported.

    Raises:
        ModelNotFoundError: There is no such model.
    """
    from qllm_runtime.support import check_support

    if name not in BUILTIN:
        from qllm_runtime.console import looking_for

        looking_for(name)
    support = check_support(name)
    verdict = "supported" if support.ok else "not supported"
    print(f"{name}: {verdict}{': ' if support.reason else ''}{' '.join(support.reason.split())}")
    return bool(support.ok)


def _facts(folder: Path) -> str:
    weights = folder / "model.safetensors"
    if not weights.exists():
        return "not in this checkout (train it with recipes/)"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return f"{settings['num_hidden_layers']} layers of {settings['hidden_size']}, {size:.1f} MB"
