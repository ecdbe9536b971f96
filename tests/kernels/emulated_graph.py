"""A CUDA graph where there is no GPU: everything a step launches is recorded and run again with the very same arguments.

What a graph could not hold (the host waiting for the device, or sending it numbers) is an error while recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

_OPERATIONS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "lift_fresh", "repeat_interleave.Tensor", "repeat_interleave.self_Tensor",
}  # fmt: skip
_FUNCTIONS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "tensor", "as_tensor",
    "from_numpy", "scalar_tensor",
}  # fmt: skip


class NotRecordableError(RuntimeError):
    """Something that no graph can hold."""


class EmulatedGraph(TorchDispatchMode):
    """Records a step while it runs; replays it.

    The first replay does nothing, as recording ran the step already (which a real capture does not).

    Attributes:
        launched: What was recorded, of all graphs of the class: names of kernels, and of operations of torch that are neither
            views nor memory without contents.
    """

    recorded = 0
    replayed = 0
    launched: ClassVar[list[str]] = []

    def __init__(self, step: Callable[[], torch.Tensor], before: Any = None) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._inside = False  # of a kernel that is interpreted
        self._ran = True
        with self._launches(), _HostFunctions(self), self:
            self.logits = step()
        type(self).recorded += 1

    def replay(self) -> None:
        type(self).replayed += 1
        if not self._ran:
            for call in self._calls:
                call()
        self._ran = False

    @contextmanager
    def _launches(self) -> Iterator[None]:
        launch = GridExecutor.__call__

        def recorded(executor: GridExecutor, *args: Any, **options: Any) -> None:
            self._calls.append(lambda: launch(executor, *args, **options))
            self.launched.append(executor.fn.__name__)
            self._inside = True
            try:
                launch(executor, *args, **options)
            finally:
                self._inside = False

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", recorded)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name, full = func.overloadpacket.__name__, str(func).removeprefix("aten.")
        picks = name.startswith("index") and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
        )
        if picks or not _OPERATIONS.isdisjoint((name, full)):
            raise NotRecordableError(f"{func} in a recorded step")
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        again = _again(func, args, kwargs, out)
        if again is not None:
            self._calls.append(again)
            if "empty" not in name:
                self.launched.append(name)
        return out

    def check(self, function: Any) -> None:
        if not self._inside and getattr(function, "__name__", "") in _FUNCTIONS:
            raise NotRecordableError(f"{function} in a recorded step")


class _HostFunctions(TorchFunctionMode):
    """Functions that on a CPU reach no operation, but on a GPU would read from it or send to it."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._graph.check(func)
        return func(*args, **(kwargs or {}))


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> Callable[[], None] | None:
    """Runs an operation on the very same arguments, its results where they were; None: it is a view."""
    inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    writes = any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
    )
    if not writes and all(x.untyped_storage().data_ptr() in inputs for x in outputs):
        return None

    def call() -> None:
        results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        for target, result in zip(outputs, results, strict=True):
            if target.data_ptr() != result.data_ptr():
                target.copy_(result)

    return call
