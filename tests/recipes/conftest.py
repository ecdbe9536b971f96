"""What tests of training share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class CudaCasts(TorchFunctionMode):
    """Beside autocast for a CPU, what autocast for CUDA does as well: these functions are computed in fp32."""

    FULL = frozenset(
        (
            *("exp", "log", "pow", "rsqrt", "reciprocal", "sum", "prod", "cumsum", "norm", "rms_norm", "nll_loss"),
            *("softmax", "log_softmax", "logsumexp"),
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in self.FULL:
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda_casts() -> CudaCasts:
    return CudaCasts()
