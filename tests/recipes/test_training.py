"""Pieces of the training code against plain definitions."""

from __future__ import annotations

import contextlib
import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from qllm_bench.questions.pools import Pools
from recipes.attention import FAR_AWAY, attend, attend_whole, causal_bias, split_bias
from recipes.batches import Sampler, filler, tempt
from recipes.evaluate import MODELS, story_prose
from recipes.export import export
from recipes.feed import Plan, Plans, batches
from recipes.init import SHALLOW, grow, initialise, places
from recipes.lookup import LookupObjective, cross_entropy
from recipes.model import SIZES, Reader, ReaderConfig
from recipes.optim import Optimizers
from recipes.train import STAGES, Stage, quick_check, weighted_loss

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 3, 8, 4, 20, 16


def small_sampler() -> Sampler:
    tokenizer = Tokenizer.from_file(str(MODELS / "reader" / "tokenizer.json"))
    return Sampler(3, tokenizer, story_prose(), ["pond", "gate", "hill"])


def heads(n: int) -> torch.Tensor:
    return torch.randn(BATCH, n, LENGTH, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("rows", [8, LENGTH])
def test_attention_and_its_gradients(clamped: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.attention.ROWS", rows)
    torch.manual_seed(0)
    q, k, v, far_q, far_k = (heads(n) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS, KV_HEADS))
    bias = causal_bias(LENGTH, q.device)
    near = torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.5 if clamped else None
    out = attend(q, k, v, bias, near, (far_q, far_k) if clamped else None)
    wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v, far_k)]
    scores = q @ wide[0].mT
    if near is not None:
        scores = torch.where(near, scores, far_q @ wide[2].mT)
    expected = (scores * DIM**-0.5 + bias).softmax(-1) @ wide[1]
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = (q, k, v, far_q, far_k) if clamped else (q, k, v)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("clamped", [False, True])
def test_the_whole_batch_at_once_is_the_same(clamped: bool) -> None:
    torch.manual_seed(0)
    q, k, v, far_q, far_k = (heads(n) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS, KV_HEADS))
    bias = causal_bias(LENGTH, q.device).double()
    if clamped:
        visible = (torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.2).tril() | torch.eye(LENGTH, dtype=torch.bool)
        near = torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.5
        hidden = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, FAR_AWAY)
        one = attend(q, k, v, hidden, near, (far_q, far_k))
        other = attend_whole(q, k, v, split_bias(visible, near, torch.float64), (far_q, far_k))
    else:
        one, other = attend(q, k, v, bias), attend_whole(q, k, v)
    torch.testing.assert_close(one, other)
    inputs = (q, k, v, far_q, far_k) if clamped else (q, k, v)
    grad = torch.randn_like(one)
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, grad) for out in (one, other)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("n_local", [None, 64])
def test_steps_as_a_gpu_takes_them(n_local: int | None, monkeypatch: pytest.MonkeyPatch, cuda_casts: Any) -> None:
    """Batches whole, with the casts of autocast for CUDA: loss, lookup loss and gradients are those of a CPU."""
    batch = small_sampler().batch(2, 256, max_gap=100, drop_share=0.5 if n_local else 0.0)
    results, checked = [], []
    for gpu in (False, True):
        torch.manual_seed(0)
        model = Reader(ReaderConfig())
        initialise(model, None, 1)
        lookup = LookupObjective(model.config)
        monkeypatch.setattr("recipes.model.takes_whole", lambda _, gpu=gpu: gpu)
        ids, positions, keep = (torch.from_numpy(x) for x in (batch.ids, batch.positions, batch.keep))
        with cuda_casts if gpu else contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16):
            hidden, inputs = model(ids, positions, n_local, keep if n_local else None)
            losses = [weighted_loss(model, hidden, batch)]
            losses += [lookup(model, inputs, batch, random.Random(1)) for _ in range(2)]
        checked.append(quick_check(model, batch, ids.device))
        sum(losses, torch.zeros(())).backward()
        Optimizers(model).step(1.0)
        results.append((torch.stack(losses).detach(), hidden.detach().float()))
    assert checked[0] == checked[1]
    (losses, hidden), (same_losses, same_hidden) = results
    torch.testing.assert_close(losses, same_losses, rtol=0.05, atol=0.0)
    assert (hidden - same_hidden).norm() < 0.1 * hidden.norm()


def test_lookup_loss_falls_with_the_wanted_block_alone() -> None:
    wanted = torch.tensor([[True, False, True], [False, True, False]])
    scores = torch.tensor([[4.0, 0.0, 4.0, 0.0], [0.0, 4.0, 0.0, 0.0]])
    one = -F.log_softmax(torch.tensor([4.0, 0.0, 0.0]), -1)[0]
    two = -F.log_softmax(torch.tensor([4.0, 0.0, 0.0, 0.0]), -1)[0]
    torch.testing.assert_close(cross_entropy(scores, wanted), (one + two) / 2)
    assert cross_entropy(-scores, wanted) > 4.0


def test_muon_goes_on_from_checkpoints_of_either_form() -> None:
    """Momentum as torch's Muon keeps it, and as the recipe's own did."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(24, 64, bias=False), "embed": nn.Linear(3, 4), "norm": nn.LayerNorm(4)})
    begun = copy.deepcopy(model)
    one = Optimizers(model)
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(3)]

    def step(network: nn.Module, optimizers: Optimizers, n: int) -> None:
        for p, g in zip(network.parameters(), gradients[n], strict=True):
            p.grad = g.clone()
        optimizers.step(0.5)

    step(model, one, 0)
    update = (begun["a"].weight - model["a"].weight) / (0.5 * 0.005 * (64 / 24) ** 0.5)
    assert all(0.5 < x < 1.4 for x in torch.linalg.svdvals(update.detach()))  # nearly orthogonal
    step(model, one, 1)
    state = one.state_dict()
    old = copy.deepcopy(state)
    old["muon"] = {
        "state": {0: {"momentum": state["muon"]["state"][0]["momentum_buffer"].clone()}},
        "param_groups": [{"lr": 0.1, "momentum": 0.95, "params": [0]}],
    }
    ends = []
    for saved in (state, old):
        other = copy.deepcopy(model)
        optimizers = Optimizers(other)
        optimizers.load_state_dict(copy.deepcopy(saved))
        step(other, optimizers, 2)
        ends.append(other["a"].weight)
    step(model, one, 2)
    for end in ends:
        torch.testing.assert_close(end, model["a"].weight)


@pytest.mark.parametrize("layers", [5, 6, 7, 8])
def test_a_grown_network_computes_what_it_did(layers: int) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 32}
    shallow, deep = (Reader(ReaderConfig(layers=n, **sizes)) for n in (SHALLOW, layers))
    initialise(shallow, None, 1)
    initialise(deep, None, 2)
    ids, positions = torch.randint(0, 64, (2, 12)), torch.arange(12).expand(2, -1)
    expected = shallow(ids, positions)[0]
    assert not torch.allclose(deep(ids, positions)[0], expected)
    grow(deep, shallow.state_dict())
    assert places(6) == (0, 1, 2, 4)
    torch.testing.assert_close(deep(ids, positions)[0], expected)


def test_prose_with_words_of_the_facts_in_it() -> None:
    sentences = ["The harbour was quiet, and Emma slept. ", "It rained.\n\n", "42 boats left Dover."]
    said = "The code of the ancient piano is 7311. Rosalind Dunby works as a porter."
    assert tempt(random.Random(1), sentences, said, 0.0) == sentences
    assert tempt(random.Random(1), sentences, "7311", 1.0) == sentences
    all_exchanged = tempt(random.Random(1), sentences, said, 1.0)
    words = set("code ancient piano works porter Rosalind Dunby".split())  # noqa: SIM905
    assert {w for s in all_exchanged for w in s.replace(",", "").replace(".", "").split() if len(w) > 3} <= words
    assert all_exchanged[2].startswith("42 ")
    assert all_exchanged[1].endswith(".\n\n")
    some = "".join(tempt(random.Random(1), sentences * 50, said, 0.1))
    assert 0.05 < 1 - some.count("harbour") / 50 < 0.2


def test_filler_says_few_sentences_again_and_again() -> None:
    prose = [f"Sentence number {i} of the book. " for i in range(200)]
    for seed in range(10):
        rng = random.Random(seed)
        said = filler(rng, Pools(rng, False, ["pond"]), prose)
        assert 1 <= len(set(said)) <= 6
        assert sum(map(len, said)) == pytest.approx(sum(map(len, prose)), rel=0.05)


def test_batches_are_the_same_whoever_makes_them() -> None:
    tokenizer = Tokenizer.from_file(str(MODELS / "reader" / "tokenizer.json"))
    made = []
    for processes in (0, 2):
        sampler = Sampler(3, tokenizer, story_prose(), ["pond", "gate", "hill"])
        plans = Plans(7, lambda step: Plan(f"test-{step}", 256, 2, 0.3, 0.5, late=step % 2 == 0))
        feed = batches(sampler, plans, processes)
        made.append([next(feed) for _ in range(5)])
    for (one, distance), (other, same_distance) in zip(*made, strict=True):
        assert distance == same_distance
        assert one.asks == other.asks
        assert all(
            np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "positions", "weights", "keep")
        )
    assert len({distance for _, distance in made[0]}) > 1
    assert not np.array_equal(made[0][0][0].ids, made[0][1][0].ids)


def test_a_plan_is_asked_for_when_its_batch_is_made() -> None:
    """A phase's stages go by the time, so that a plan made ahead would be of the stage before."""
    tokenizer = Tokenizer.from_file(str(MODELS / "reader" / "tokenizer.json"))
    sampler = Sampler(3, tokenizer, story_prose(), ["pond"])
    length = 128
    feed = batches(sampler, Plans(0, lambda step: Plan(f"test-{step}", length, 1, 0.0, 0.0, late=False)), 0)
    assert next(feed)[0].ids.shape == (1, 128)
    length = 192
    assert next(feed)[0].ids.shape == (1, 192)


@pytest.mark.parametrize(("size", "layers"), [("small", 6), ("large", 8)])
def test_sizes_fit_twelve_megabytes(size: str, layers: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = replace(SIZES[size], max_positions=2048)
    model = Reader(config)
    initialise(model, None, 1)
    torch.save({"model": model.state_dict()}, tmp_path / "trained.pt")
    export(tmp_path / "trained.pt", MODELS / "reader", tmp_path / "out", config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded.config.num_hidden_layers == layers
    assert (size == "large") == (5_000_000 < sum(p.numel() for p in loaded.parameters()) < 6_000_000)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length
        == loaded.config.max_position_embeddings
        == 2048
    )
    ids = torch.randint(16, 2000, (1, 40))
    with torch.no_grad():
        mine = model.logits(model(ids, torch.arange(40)[None])[0])
        torch.testing.assert_close(loaded(ids).logits, mine, rtol=0.1, atol=0.1)


def test_more_than_twelve_megabytes_are_refused(tmp_path: Path) -> None:
    config = ReaderConfig(layers=9)
    torch.save({"model": Reader(config).state_dict()}, tmp_path / "trained.pt")
    with pytest.raises(ValueError, match=r"13\.5 MB in fp16, a reader may have 12 MB"):
        export(tmp_path / "trained.pt", MODELS / "reader", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stages", [s for phases in STAGES.values() for s in phases.values()])
def test_stages_end_with_their_phase(stages: tuple[Stage, ...]) -> None:
    ends = [end for end, *_ in stages]
    assert ends == sorted(set(ends)) and ends[-1] == 1.0
