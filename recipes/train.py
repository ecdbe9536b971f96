"""Train the reader: ``python -m recipes.train --text DIR --out DIR [--minutes N] [--device cpu|cuda] [--size small|large]``.

Phases: ``base`` (four layers), ``trunk`` (two more), then from the trunk ``plain`` (decayed to zero) and ``reader`` (trained
on with the lookup objective, and decayed). Interrupted runs go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Some machines advertise AMX and trap its use; this caps oneDNN one level below it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# Its threads do not live on in the processes that make batches.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from qllm_bench.questions.data import Prose, common_words, make_case, read_books, unwrap
from qllm_runtime.samples import story
from recipes import checkpoint
from recipes.batches import FAMILY_WEIGHTS, Batch, Sampler
from recipes.checkpoint import Identity, OtherRunError
from recipes.export import export, plot_curve
from recipes.feed import Plan, Plans, batches
from recipes.init import SHALLOW, grow, initialise
from recipes.lookup import LookupObjective
from recipes.model import SIZES, Reader
from recipes.optim import Optimizers
from recipes.tokenizer import VOCABULARY, train_tokenizer

SEED = 20240607
SHARES = {"base": 0.32, "trunk": 0.35, "plain": 0.14, "reader": 0.19}
# The phase that each one goes on from.
AFTER = {"base": None, "trunk": "base", "plain": "trunk", "reader": "trunk"}
STORIES = 6
# By device and phase: (end of the stage as a share of the phase, sequence length, sequences per step, share of easy samples)
Stage = tuple[float, int, int, float]
STAGES: dict[str, dict[str, tuple[Stage, ...]]] = {
    "cpu": {
        "base": ((0.06, 128, 32, 1.0), (0.16, 192, 24, 0.6), (0.75, 256, 24, 0.45), (1.0, 512, 12, 0.45)),
        "trunk": ((0.35, 256, 24, 0.35), (0.5, 512, 12, 0.35), (1.0, 512, 12, 0.2)),
        "plain": ((0.94, 512, 12, 0.25), (1.0, 1024, 6, 0.25)),
        "reader": ((0.94, 512, 12, 0.25), (1.0, 1024, 6, 0.25)),
    },
    "cuda": {
        "base": ((0.04, 128, 256, 1.0), (0.12, 192, 192, 0.6), (0.6, 256, 192, 0.45), (1.0, 512, 96, 0.45)),
        "trunk": ((0.3, 512, 96, 0.35), (0.7, 1024, 48, 0.2), (1.0, 2048, 24, 0.2)),
        "plain": ((0.3, 1024, 48, 0.25), (0.85, 2048, 24, 0.25), (1.0, 4096, 12, 0.25)),
        "reader": ((0.3, 1024, 48, 0.25), (0.85, 2048, 24, 0.25), (1.0, 4096, 12, 0.25)),
    },
}
# Context that the model is declared for.
MAX_POSITIONS = {"cpu": 512, "cuda": 2048}
# Share of a phase after which more is drawn of what is learnt late.
LATE_FROM = {"base": 1.0, "trunk": 0.4, "plain": 0.0, "reader": 0.0}
CLAMP_SHARE = {"base": 0.2, "trunk": 0.25, "plain": 0.4, "reader": 0.35}
SAVE_EVERY_S = 120.0
CHECK_EVERY_S = 60.0


def lr_factor(phase: str, progress: float, step: int) -> float:
    """Learning rate as a share of its peak."""
    warm = min(1.0, (step + 1) / 40)
    if phase == "base":
        return warm * (1.0 - 0.6 * max(0.0, (progress - 0.4) / 0.6))
    if phase == "trunk":
        return warm * (1.2 - 0.9 * progress)
    return max(0.005, 0.3 * (1.0 - progress))


def build_tokenizer(books: list[str], folder: Path) -> Tokenizer:
    """Train the tokenizer on the prose and on generated facts, or load it when it is there."""
    path = folder / "tokenizer.json"
    if not path.exists():
        rng = random.Random(SEED)
        prose = Prose.of(books[0])
        texts = [b[i : i + 2000] for b in books for i in range(0, len(b), 2000)]
        for _ in range(3000):
            case = make_case(rng, prose, 0, rng.choice(list(FAMILY_WEIGHTS)), 4, evaluation=False)
            texts += [case.document, case.question, case.answer]
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts).save(str(path))
    return Tokenizer.from_file(str(path))


def weighted_loss(model: Reader, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the tokens that carry a weight."""
    weights = torch.from_numpy(batch.weights).to(hidden.device)[:, 1:]
    targets = torch.from_numpy(batch.ids).to(hidden.device)[:, 1:]
    chosen = weights > 0
    logits = model.logits(hidden[:, :-1][chosen]).float()
    losses = F.cross_entropy(logits, targets[chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights.sum()


@torch.no_grad()
def quick_check(model: Reader, batch: Batch, device: torch.device) -> dict[str, float]:
    """Share of questions whose decisive tokens are all predicted, in all and per family (teacher forced)."""
    hidden, _ = model(torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.positions).to(device))
    best = model.logits(hidden[:, :-1]).argmax(-1).cpu().numpy()
    right = best == batch.ids[:, 1:]
    found: dict[str, list[bool]] = {}
    for row, families in enumerate(batch.families):
        for n, family in enumerate(families):
            hit = bool(right[row][batch.value[row][1:] == n + 1].all())
            for name in ("all", family):
                found.setdefault(name, []).append(hit)
    return {k: round(sum(v) / len(v), 3) for k, v in sorted(found.items())}


@torch.no_grad()
def repetition(model: Reader, device: torch.device) -> float:
    """Share of random tokens predicted right when a run of them is repeated: whether the copying heads are whole."""
    run = torch.randint(16, VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(SEED))
    ids = torch.cat((run, run), dim=1).to(device)
    hidden, _ = model(ids, torch.arange(120, device=device).expand(8, -1))
    best = model.logits(hidden[:, 63:-1]).argmax(-1)
    return round(float((best == ids[:, 64:]).float().mean()), 3)


def saved_state(phase: str, identity: Identity, out: Path) -> dict[str, Any] | None:
    """The checkpoint that a phase goes on from, with its ``phase``: its own, else that of the phase before, if there is one.

    Raises:
        OtherRunError: If it is of another run. One that a phase only begins with may have had other minutes.
    """
    for name in (phase, AFTER[phase]):
        if name is not None and (out / f"{name}.pt").exists():
            free = () if name == phase else ("minutes",)
            return {**checkpoint.read(out / f"{name}.pt", identity, free), "phase": name}
    return None


class Run:
    """One phase of training.

    Args:
        phase: One of ``SHARES``.
        identity: The run that it is a part of.
        books: Prose by title.
        out: Folder of checkpoints.
        processes: Others that make the batches; 0: none.

    Raises:
        OtherRunError: If a checkpoint in ``out`` that the phase has to go on from is of another run.
    """

    def __init__(self, phase: str, identity: Identity, books: Mapping[str, str], out: Path, processes: int = 0) -> None:
        self.phase, self.identity, self.out, self.processes = phase, identity, out, processes
        self.seconds, self.device = identity.minutes * SHARES[phase] * 60, torch.device(identity.device)
        state = saved_state(phase, identity, out)
        plain = [unwrap(b) for b in books.values()]
        declared = replace(SIZES[identity.size], max_positions=MAX_POSITIONS[identity.device])
        self.config = declared if phase != "base" else replace(declared, layers=SHALLOW)
        self.tokenizer = build_tokenizer(plain, out / "tokenizer")
        words = common_words(plain, 5)
        prose = [Prose.of(b) for b in books.values()] + [Prose.of(b) for b in plain]
        stories = ["\n\n".join(story(random.Random(f"train-{i}"), 60_000)) for i in range(STORIES)]
        prose += [Prose.of(s) for s in stories]
        self.sampler = Sampler(SEED, self.tokenizer, prose, words)
        dev = Sampler(SEED + 1, self.tokenizer, prose, words, evaluation=True)
        self.dev = dev.batch(64, 256, gap_share=0.0)
        self.dev_easy = dev.batch(48, 256, gap_share=0.0, easy=1.0)
        self.model = Reader(self.config)
        initialise(self.model, self.tokenizer, SEED)
        self.model.to(self.device)
        self.optimizers = Optimizers(self.model)
        self.lookup = LookupObjective(self.config) if phase == "reader" else None
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.log: list[dict[str, object]] = []
        # Losses of recent steps, the latest ones most; None before the first.
        self.mean: tuple[float, float] | None = None
        self.path = out / f"{phase}.pt"
        if state is not None:
            self.start_from(state)

    def start_from(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: of this phase, or of the one before."""
        if state["phase"] == "base" and self.phase == "trunk":
            grow(self.model, state["model"])
            return
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        if state["phase"] == self.phase:
            self.step, self.elapsed, self.tokens, self.log = (state[k] for k in ("step", "elapsed", "tokens", "log"))
            self.mean = state.get("mean")
            if self.lookup is not None:
                self.lookup.load_state_dict(state.get("lookup", {}), self.device)

    def save(self) -> None:
        """Write a checkpoint and the log."""
        state = {
            "model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(), "step": self.step,
            "elapsed": self.elapsed, "tokens": self.tokens, "log": self.log, "mean": self.mean,
            "lookup": self.lookup.state_dict() if self.lookup is not None else {},
        }  # fmt: skip
        checkpoint.write(self.path, self.identity, state)
        (self.out / f"{self.phase}.json").write_text(json.dumps(self.log), encoding="utf-8")

    def plan(self, step: int) -> Plan:
        """What the batch of a step is to be, at the present time."""
        progress = min(1.0, self.elapsed / self.seconds)
        stages = STAGES[self.identity.device][self.phase]
        length, count, easy = next(stage[1:] for stage in stages if progress <= stage[0])
        late = progress >= LATE_FROM[self.phase]
        return Plan(f"{self.phase}-{SEED}-{step}", length, count, easy, CLAMP_SHARE[self.phase], late)

    def train_step(self, batch: Batch, n_local: int | None) -> tuple[float, float]:
        """One step; returns the answer loss and the lookup loss.

        Args:
            batch: Its batch.
            n_local: Distance that is clamped.
        """
        progress = min(1.0, self.elapsed / self.seconds)
        ids = torch.from_numpy(batch.ids).to(self.device)
        positions = torch.from_numpy(batch.positions).to(self.device)
        keep = torch.from_numpy(batch.keep).to(self.device) if n_local else None
        extra = 0.0
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden, inputs = self.model(ids, positions, n_local, keep)
            loss = weighted_loss(self.model, hidden, batch)
            total = loss
            if self.lookup is not None:
                side = self.lookup(self.model, inputs, batch, random.Random(f"lookup-{SEED}-{self.step}"))
                total = loss + self.lookup.weight * side
                extra = float(side.detach())
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(lr_factor(self.phase, progress, self.step))
        self.step += 1
        self.tokens += batch.ids.size
        return float(loss.detach()), extra

    def check(self) -> None:
        """Append the quick check of the present weights to the log."""
        exact = quick_check(self.model, self.dev, self.device)
        easy = quick_check(self.model, self.dev_easy, self.device)["all"]
        exact["repeat"] = repetition(self.model, self.device)
        loss, extra = self.mean or (0.0, 0.0)
        self.log.append(
            {
                "step": self.step,
                "minutes": round(self.elapsed / 60, 2),
                "tokens": self.tokens,
                "loss": round(loss, 4),
                "lookup_loss": round(extra, 4),
                "exact": exact,
                "easy": easy,
            }
        )

    def run(self) -> None:
        """Train to the end of the phase."""
        bar = tqdm(total=round(self.seconds), initial=round(self.elapsed), unit="s", desc=self.phase, mininterval=10)
        # Processor time does not depend on what else the machine does; on a GPU it would leave out the GPU's work.
        clock = time.process_time if self.device.type == "cpu" and torch.get_num_threads() == 1 else time.monotonic
        saved = checked = self.elapsed
        feed = batches(self.sampler, Plans(self.step, self.plan), self.processes)
        while self.elapsed < self.seconds:
            began = clock()
            loss, extra = self.train_step(*next(feed))
            before = self.mean or (loss, extra)
            self.mean = (0.95 * before[0] + 0.05 * loss, 0.95 * before[1] + 0.05 * extra)
            self.elapsed += clock() - began
            bar.update(round(self.elapsed) - bar.n)
            if self.elapsed - checked >= CHECK_EVERY_S or self.elapsed >= self.seconds:
                checked = self.elapsed
                self.check()
                tqdm.write(json.dumps(self.log[-1]))
            if self.elapsed - saved >= SAVE_EVERY_S:
                saved = self.elapsed
                self.save()
        bar.close()
        self.save()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the reader.")
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt prose")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints, curves and the finished models"
    )
    parser.add_argument("--minutes", type=float, default=115.0, help="training time of all phases together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="size of the network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--processes", type=int, default=0, help="number of other processes that make batches; for a GPU"
    )
    parser.add_argument("--phase", choices=tuple(SHARES), help="run one phase only")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    books = read_books(args.text, held_out=False)
    if not books:
        parser.error(f"--text: no prose to train on in {args.text}; give a folder of .txt files")
    identity = Identity(args.minutes, args.device, checkpoint.digest(books), SEED, args.size)
    phases = [args.phase] if args.phase else list(SHARES)
    start = AFTER[phases[0]]
    if start is not None and not any((args.out / f"{name}.pt").exists() for name in (start, phases[0])):
        parser.error(f"there is no {args.out / f'{start}.pt'} to go on from; run --phase {start} first")
    try:
        for phase in phases:
            saved_state(phase, identity, args.out)
    except OtherRunError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        run = Run(phase, identity, books, args.out, args.processes)
        run.run()
        if phase in ("plain", "reader"):
            folder = args.out / ("reader" if phase == "reader" else "reader-plain")
            export(run.path, args.out / "tokenizer", folder, run.config)
    plot_curve([args.out / f"{p}.json" for p in SHARES], args.out / "curve.png")


if __name__ == "__main__":
    main()
