"""`python tests/kernels/compile_all.py [kernel ...]`: compile every case of `cases.py` and write `budgets.json`.

Some hundred compilations, a few seconds each: run it after a kernel has changed. Cases of kernels that are not named keep
their numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cases import KERNELS, SHARED, covering

BUDGETS = Path(__file__).with_name("budgets.json")


def main(names: list[str]) -> int:
    """Returns how many cases break a rule."""
    table: dict[str, dict[str, list[int]]] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
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
        BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name}: {len(rows)} cases", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
