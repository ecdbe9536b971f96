"""CPU speed against plain transformers, as ratios in one run on one thread.

A random Llama reads a long prompt in chunks and decodes: once through our memory, once through stock sdpa attention with
`DynamicCache` and the same chunks. Run `python -m benchmarks --help`.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

LENGTHS = (32_768, 131_072)
MEMORY = {"n_init": 64, "n_local": 512, "block_size": 64, "topk": 8, "exec_block_size": 256, "chunk_size": 2048}


def _measure(kind: str, length: int, steps: int) -> dict[str, float]:
    """Prefill seconds, decode milliseconds and peak memory of one kind, in this process."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from qllm_runtime import MemoryConfig
    from qllm_runtime.inference import Inference

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=length + 64,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 4096, (length,))
    result: dict[str, float] = {}
    if kind == "dense":
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            began = time.perf_counter()
            for part in ids[:-1].split(MEMORY["chunk_size"]):
                model(input_ids=part[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            result["prefill_s"] = time.perf_counter() - began
            token = ids[-1:]
            times = []
            for _ in range(steps):
                began = time.perf_counter()
                logits = model(input_ids=token[None], past_key_values=cache, use_cache=True).logits
                times.append(time.perf_counter() - began)
                token = logits[0, -1:].argmax(-1)
    else:
        config = MemoryConfig(policy=kind, **MEMORY)
        inference = Inference(model)
        with inference.request():
            cache = inference.cache(config, reserve=length + steps)
            began = time.perf_counter()
            inference.read(cache, [ids[:-1]], config)
            result["prefill_s"] = time.perf_counter() - began
            last = int(ids[-1])
            times = []
            for _ in range(steps):
                began = time.perf_counter()
                logits = inference.step(cache, [last])
                times.append(time.perf_counter() - began)
                last = int(logits[0].argmax(-1))
    result["decode_ms"] = 1000 * sorted(times)[len(times) // 2]
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def _in_process(kind: str, length: int, steps: int) -> dict[str, float]:
    """Measure in a fresh process, so that peak memory is this run's own."""
    code = f"import json; from benchmarks.speed_cpu import _measure; print(json.dumps(_measure({kind!r}, {length}, {steps})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(json.loads(out.strip().splitlines()[-1]))


def _draw(runs: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of prefill, decode and peak memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"prefill_s": "prefill (s)", "decode_ms": "decode (ms per token)", "peak_mib": "peak memory (MiB)"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.barh(list(runs), [run[name] for run in runs.values()], color="#4878a8")
        axis.set_title(title)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results/speed_cpu.json"),
    steps: Annotated[int, typer.Option(help="Decode steps; the median counts.")] = 32,
    long: Annotated[bool, typer.Option(help="Also read 131,072 tokens through the memory for the growth.")] = True,
) -> None:
    """Compare the memory with stock attention on this machine."""
    import torch
    import transformers

    runs = {f"{kind}@{LENGTHS[0]}": _in_process(kind, LENGTHS[0], steps) for kind in ("qllm", "streaming", "dense")}
    ours, dense = runs[f"qllm@{LENGTHS[0]}"], runs[f"dense@{LENGTHS[0]}"]
    ratios = {
        "prefill": dense["prefill_s"] / ours["prefill_s"],
        "decode": dense["decode_ms"] / ours["decode_ms"],
        "peak_memory": ours["peak_mib"] / dense["peak_mib"],
    }
    if long:
        runs[f"qllm@{LENGTHS[1]}"] = _in_process("qllm", LENGTHS[1], steps)
        ratios["growth_128k_over_32k"] = runs[f"qllm@{LENGTHS[1]}"]["prefill_s"] / ours["prefill_s"]
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    report = {"date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(), "threads": 1,
              "versions": versions, "memory": MEMORY, "runs": runs, "ratios": ratios}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    _draw(runs, output.with_suffix(".png"))
    for name, run in runs.items():
        print(
            f"{name:18} prefill {run['prefill_s']:7.2f} s   decode {run['decode_ms']:7.2f} ms   peak {run['peak_mib']:6.0f} MiB"
        )
    print("   ".join(f"{name} {value:.2f}" for name, value in ratios.items()))


if __name__ == "__main__":
    typer.run(main)
