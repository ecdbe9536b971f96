"""Compiles kernels for GPUs that are not there and reads what the binary will use."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCH = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Usage:
    """What one program of a kernel takes; spilled counts bytes of stack and local memory, matrix tensor-core instructions.

    Attributes:
        counted: Programs count which of them ends last, and all threads' stores come before that, all loads after it.
    """

    registers: int
    shared: int
    spilled: int
    matrix: int
    warp_groups: bool
    counted: bool


@dataclass(frozen=True)
class Compilation:
    """A kernel with everything its compilation depends on.

    Attributes:
        pointers: Triton type of each pointer, all aligned to 16 bytes.
        constants: Compile-time arguments and launch options.
        floats: Names of arguments that are floating-point numbers.
        wide: Names of arguments that are 64-bit integers. Strides that are specialised are multiples of 16.
    """

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()

    def source(self) -> tuple[Any, dict[str, int]]:
        from triton.compiler import ASTSource

        options = {name: self.constants[name] for name in LAUNCH if name in self.constants}
        constexprs = {name: value for name, value in self.constants.items() if name not in options}
        signature, attributes = {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in constexprs:
                signature[name] = "constexpr"
                continue
            integer = "i64" if name in self.wide else "i32"
            signature[name] = self.pointers.get(name, "fp32" if name in self.floats else integer)
            if name in self.pointers or (name.startswith("stride_") and name not in self.kernel.do_not_specialize):
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs, attributes), options

    def usage(self, arch: int) -> Usage:
        """Compile to a binary for sm_`arch`."""
        import triton
        from triton.backends.compiler import GPUTarget

        source, options = self.source()
        binary = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options}
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [_cuobjdump(), "-res-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
        ptx = binary.asm["ptx"]
        instructions = [ptx.count(name) for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync")]
        return Usage(
            registers=used["REG"],
            shared=binary.metadata.shared,
            spilled=used["STACK"] + used["LOCAL"],
            matrix=sum(instructions),
            warp_groups=sum(instructions[:2]) > 0,
            counted=_counted(ptx),
        )


def _counted(ptx: str) -> bool:
    """Whether an atomic operation that releases and acquires stands between two barriers, and no load may read ahead of it."""
    steps = re.findall(r"\b(?:(?:ld|st|red)\.global[\w.]*|cp\.async\.c[ag]|atom\.[\w.]*|bar\.sync)", ptx)
    counts = [i for i, step in enumerate(steps) if step.startswith("atom")]
    ordered = all(
        steps[i].startswith("atom.global.gpu.acq_rel") and steps[i - 1] == steps[i + 1] == "bar.sync" for i in counts
    )
    return len(counts) == 1 and ordered and not any(step.startswith("ld.global.nc") for step in steps)


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
