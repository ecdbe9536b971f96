"""Prefix sums of queries: with them the linear token scores (paper eq. 4) need one dot product per key."""

from __future__ import annotations

import torch


def query_prefix(query: torch.Tensor) -> torch.Tensor:
    """Sums of all queries before each token.

    Args:
        query: [heads, n, head_dim] rotated queries, those of a group added up.

    Returns:
        [heads, n + 1, head_dim] fp32; entry t is the sum of queries 0 .. t - 1.
    """
    return torch.nn.functional.pad(query.float().cumsum(1), (0, 0, 1, 0))
