"""Write a trained checkpoint the way transformers loads it, and draw the training curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from recipes.model import ReaderConfig
from recipes.tokenizer import BOS, END, PAD, save_tokenizer_config

LIMIT = 12_000_000  # bytes of the weights' file


def export(checkpoint: Path, tokenizer: Path, folder: Path, config: ReaderConfig) -> None:
    """Write config, fp16 weights and tokenizer of a checkpoint.

    Args:
        checkpoint: File written by ``recipes.train``.
        tokenizer: Folder of the tokenizer.
        folder: Folder to write to.
        config: Sizes of the network.

    Raises:
        ValueError: If the weights take more than ``LIMIT``; nothing is written then.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    tensors = {f"model.{k}": v.to(torch.float16).contiguous() for k, v in state.items()}
    content = save(tensors, metadata={"format": "pt"})
    if len(content) > LIMIT:
        raise ValueError(
            f"the weights in {checkpoint} take {len(content) / 1e6:.1f} MB in fp16, a reader may have {LIMIT / 1e6:.0f} MB: "
            "train a network of fewer layers or a narrower one (SIZES in recipes/model.py)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    tokens = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float16"}
    files = {
        "config.json": {**llama, **config.to_llama(), **tokens},
        "generation_config.json": {**tokens, "do_sample": False, "max_new_tokens": 256},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    save_tokenizer_config(folder, config.max_positions)


def plot_curve(logs: Sequence[Path], path: Path) -> None:
    """Draw loss and quick exact match over minutes; the last two phases both start where the one before them ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    shift = 0.0
    for n, log in enumerate(logs):
        rows = json.loads(log.read_text(encoding="utf-8")) if log.exists() else []
        minutes = [r["minutes"] + shift for r in rows]
        left.plot(minutes, [r["loss"] for r in rows], label=log.stem)
        right.plot(minutes, [r["exact"]["all"] for r in rows], label=log.stem)
        if rows and n < len(logs) - 2:
            shift += rows[-1]["minutes"]
    left.set(xlabel="minutes", ylabel="weighted loss", yscale="log")
    right.set(xlabel="minutes", ylabel="exact, unseen names and numbers, 256 tokens", ylim=(0, 1))
    right.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
