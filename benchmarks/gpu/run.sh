#!/usr/bin/env bash
# Everything that needs a GPU: correctness and speed of the kernels, speed of models of random weights. Under ten minutes, no
# network. `run.sh --tiny --device cpu` goes through the same code in small, to see that it works; `--output FILE` says where the
# JSON goes (else gpu.json in the folder OUT, if that is set), which is written after every row.
#
# Each part is a process, first all of them beside each other for what they compile, then one after the other for what they
# measure. What stops (an illegal access, a kernel that never ends) begins anew behind the row that did it.
#
# What a Python with torch, triton and transformers may lack (pydantic, typer) is taken from wheels in benchmarks/gpu/wheels, which
# git ignores (name the folder where ignored files must be named to be carried to another machine); nothing is installed. This
# fills it on a machine with a network, here for Python 3.12 on x86-64:
#   pip download --dest benchmarks/gpu/wheels --constraint constraints.txt --only-binary :all: --python-version 3.12 --platform manylinux2014_x86_64 pydantic typer
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-$(command -v python3 || echo python)}"
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

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
  find benchmarks/gpu -path '*/wheels/*.whl' -exec "$python" -m zipfile -e {} "$scratch/modules" \;
  export PYTHONPATH="$PYTHONPATH:$scratch/modules"
  names="$(missing)"
  if test -n "$names"; then
    echo "$python has no $names, nor have the wheels in benchmarks/gpu/wheels: fill it as the head of $0 says." >&2
    exit 1
  fi
fi
began="$(date +%s)"
status=0

left() { # seconds of so many that the whole run still has
  local rest=$((began + 580 - $(date +%s)))
  echo $((rest < $1 ? rest : $1))
}

measure() { # a part, and the seconds it may take: again behind the row that stopped it, as long as there is time
  local code
  for _ in 1 2 3 4 5; do
    test "$(left "$2")" -gt 5 || break
    code=0
    timeout -k 5 "$(left "$2")" "$python" -u -m benchmarks.gpu --only "$1" --began "$began" "${@:3}" || code=$?
    case $code in
      0) return ;;
      1) break ;;
      2) exit 2 ;;
      *) echo "$1 stopped with status $code" ;;
    esac
  done
  status=1
}

operations=({attention,choice,memory}:{Llama-3-8B,Qwen2.5-1.5B})
models=(Qwen2.5-1.5B Llama-3-8B)
measure ceilings 60 "$@"
for part in "${operations[@]}" "${models[@]}"; do
  OMP_NUM_THREADS=2 timeout -k 5 120 "$python" -m benchmarks.gpu --only "$part" --short "$@" --output "$scratch/$part.json" \
    > "$scratch/$part.log" 2>&1 &
done
wait
for part in "${operations[@]}"; do measure "$part" 60 "$@"; done
for part in "${models[@]}"; do measure "$part" 240 "$@"; done
exit "$status"
