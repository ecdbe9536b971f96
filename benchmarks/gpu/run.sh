#!/usr/bin/env bash
# Everything that needs a GPU: correctness and speed of the kernels, speed of models of random weights. Under ten minutes, no
# network. `run.sh --tiny --device cpu` goes through the same code in small, to see that it works; `--output FILE` says where the
# JSON goes, which is written after every row.
#
# What a Python with torch, triton and transformers may lack (pydantic) is taken from wheels in benchmarks/gpu/wheels, which git
# ignores; nothing is installed. This fills the folder on a machine with a network, here for Python 3.12 on x86-64:
#   pip download --dest benchmarks/gpu/wheels --constraint constraints.txt --only-binary :all: --python-version 3.12 --platform manylinux2014_x86_64 pydantic
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-$(command -v python3 || echo python)}"
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"

missing() { # modules that cannot be found, and whether pydantic is one for this Python
  "$python" - <<'END'
import importlib.util
names = [name for name in ("torch", "transformers", "typer", "pydantic") if importlib.util.find_spec(name) is None]
try:
    import pydantic
except ImportError as error:
    names = names or [f"pydantic ({error})"]
print(*names)
END
}

if test -n "$(missing)"; then
  unpacked="$(mktemp -d)"
  trap 'rm -rf "$unpacked"' EXIT
  find benchmarks/gpu -path '*/wheels/*.whl' -exec "$python" -m zipfile -e {} "$unpacked" \;
  export PYTHONPATH="$PYTHONPATH:$unpacked"
  names="$(missing)"
  if test -n "$names"; then
    echo "$python has no $names, nor have the wheels in benchmarks/gpu/wheels: fill it as the head of $0 says." >&2
    exit 1
  fi
fi
began="$(date +%s)"
status=0
for part in operations Qwen2.5-1.5B Llama-3-8B; do # a process each: an illegal access ends one of them, not the run
  "$python" -u -m benchmarks.gpu --only "$part" --began "$began" "$@" || status=1
done
exit "$status"
