"""`python tests/kernels/compile_all.py [kernel ...]`: compile every case of `cases.py` and write `budgets.json`.

Some hundred compilations, a few seconds each: run it after a kernel has changed. Cases of kernels that are not named keep
their numbers; all numbers of a table come from one minor version of Triton, which it names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import triton
from cases import KERNELS, SHARED, covering

BUDGETS = Path(__file__).with_name("budgets.json")
TRITON = ".".join(triton.__version__.split(".")[:2])


def read() -> tuple[str, dict[str, dict[str, list[int]]]]:
    """The minor version of Triton, and registers, shared memory and tensor-core instructions by kernel and case."""
    table = json.loads(BUDGETS.read_text())
    return table.pop("triton"), table


def main(names: list[str]) -> int:
    """Returns how many cases break a rule."""
    made_with, table = read()
    if names and made_with != TRITON:
        sys.exit(f"The table is of Triton {made_with}, this is {TRITON}: compile all kernels, or use that version.")
    broken = 0
    for name in names or list(KERNELS):
        rows = {}
        for case in covering(name):
            try:
                usage = KERNELS[name](case).usage(case.arch)
            except Exception as error:
                broken += 1
                print(f"{name}, {case.label}: {error!r}"[:400], flush=True)
                continue
            rows[case.label] = [usage.registers, usage.shared, usage.matrix]
            if usage.spilled or usage.registers > 255 or usage.shared > SHARED[case.arch]:
                broken += 1
                print(f"{name}, {case.label}: {usage}", flush=True)
        table = {kernel: table.get(kernel, {}) for kernel in KERNELS} | {name: rows}
        lines = (
            f" {json.dumps(kernel)}: {{\n"
            + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
            + "\n }"
            for kernel, found in table.items()
            if found
        )
        BUDGETS.write_text(",\n".join((f'{{\n "triton": "{TRITON}"', *lines)) + "\n}\n")
        print(f"{name}: {len(rows)} cases", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
