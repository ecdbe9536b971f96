"""Rotation against the functions of transformers' models."""

from __future__ import annotations

import pytest
import torch
from making import random

from qllm_kernels import dispatch
from qllm_kernels.rotary import Arrival, Destination, rotate


@pytest.mark.parametrize(("model", "interleaved"), [("llama", False), ("cohere", True)])
def test_as_the_models_rotate(model, interleaved):
    module = __import__(f"transformers.models.{model}.modeling_{model}", fromlist=["apply_rotary_pos_emb"])
    x, angles = random(1, 3, 7, 16), random(7, 8, seed=1)
    angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = module.apply_rotary_pos_emb(x, x, cos[None], sin[None])
    torch.testing.assert_close(rotate(x, cos, sin, interleaved=interleaved), expected)


def test_append_keeps_raw_keys_in_their_page_and_rotated_ones_in_the_window():
    query, key, value = random(2, 3, 8), random(1, 3, 8, seed=1), random(1, 3, 8, seed=2)
    angles = random(10, 4, seed=3)
    window = Destination(torch.zeros(1, 6, 8), torch.zeros(1, 6, 8), torch.tensor([5, 0, 1]))
    pages = torch.zeros(2, 1, 2, 4, 8)
    raw = Destination(pages[0].flatten(1, 2), pages[1].flatten(1, 2), torch.tensor([-1, 4, 5]))
    positions = torch.tensor([7, 8, 9])
    tables = angles.cos(), angles.sin()
    far_angles = torch.stack([table[3] for table in tables])
    near, far = dispatch.rotate_append(Arrival(query, key, value, *tables, positions, window, raw), far_angles)
    torch.testing.assert_close(far, rotate(query, tables[0][[3] * 3], tables[1][[3] * 3]))
    torch.testing.assert_close(near, rotate(query, angles[7:].cos(), angles[7:].sin()))
    torch.testing.assert_close(window.key[:, [5, 0, 1]], rotate(key, angles[7:].cos(), angles[7:].sin()))
    assert torch.equal(pages[0, :, 1, :2], key[:, 1:])
    assert torch.equal(pages[1, :, 1, :2], value[:, 1:])
    assert not pages[:, :, 0].any()
    assert torch.equal(window.value[:, 5], value[:, 0])
