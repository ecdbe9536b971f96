"""Compiles kernels for GPUs that are not there and reads what the binary will use."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCH = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Usage:
    """What one program of a kernel takes; spilled counts bytes of stack and local memory."""

    registers: int
    shared: int
    spilled: int
    wgmma: int
    mma: int


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int) -> Usage:
    """Compile `kernel` to a binary for sm_`arch`.

    Args:
        types: Triton type of every run-time argument; `/16` behind it promises divisibility by 16.
        constants: Compile-time arguments and launch options.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in LAUNCH if name in constants}
    constexprs = {name: value for name, value in constants.items() if name not in options}
    signature = {name: types[name].partition("/")[0] if name in types else "constexpr" for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types.get(name, "").endswith("/16")
    }
    source = ASTSource(kernel, signature, constexprs, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = binary.asm["ptx"]
    return Usage(
        registers=used["REG"],
        shared=binary.metadata.shared,
        spilled=used["STACK"] + used["LOCAL"],
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
    )
