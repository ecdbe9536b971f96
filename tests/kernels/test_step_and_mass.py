"""The torch functions of a step in a graph and of attention mass, against the attention they belong to."""

from __future__ import annotations

import torch
from making import segments

from qllm_kernels import attention, dispatch


def test_step_is_attention_of_one_piece():
    given = segments(length=1, back=9, loose=6, hide=True, pages=2, short=True)
    expected = attention.attend_pieces(given.near, given.key, given.value, given.far, **given.sizes)
    where = {name: torch.tensor([given.sizes[name]]) for name in ("slot", "back")}
    key, value = given.key.nan_to_num(), given.value.nan_to_num()
    actual = dispatch.attend_step(given.near, key, value, given.far, **where, scale=0.2)
    torch.testing.assert_close(actual, expected)


def test_mass_is_what_values_are_weighed_with():
    """Values of one give the mass of all keys; a value of one at a single key gives that key's."""
    given = segments(pieces=2, length=4, back=9, loose=6, hide=True, pages=2, short=True)
    _, lse = attention.attend_pieces(given.near, given.key, given.value, given.far, **given.sizes)
    mass = dispatch.attention_mass(given.near, given.key, given.far, lse, **given.sizes)
    total = mass.window.sum(2) + mass.pages.sum((2, 3)) + mass.loose.sum(2)
    torch.testing.assert_close(total, torch.full((2, 2), 8.0))  # two heads of four tokens
    marked = torch.zeros_like(given.value)
    slot = given.sizes["slot"] + 10
    marked[:, slot] = 1.0
    blank = attention.FarSegment(
        **{
            **vars(given.far),
            "value": torch.zeros_like(given.far.value),
            "page_value": given.far.page_value.new_zeros(given.far.page_value.shape),
        }
    )
    out, _ = attention.attend_pieces(given.near, given.key, marked, blank, **given.sizes)
    received = out[..., 0].view(2, 2, 2, 4).sum((1, 3)).T  # [pieces, kv_heads]
    torch.testing.assert_close(mass.window[0, :, 10], received[0])
    torch.testing.assert_close(mass.window[1, :, 6], received[1])
