#!/usr/bin/env bash
# Everything that needs a GPU: correctness and speed of the kernels, speed of models of random weights. Under ten minutes, no
# network. `run.sh --tiny --device cpu` goes through the same code in small, to see that it works.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
