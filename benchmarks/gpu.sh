#!/usr/bin/env bash
# All that needs a GPU, in one call: build, info, tests, compute-sanitizer, benchmark. Everything is
# tried even if something before it failed. Needs torch with CUDA, nvcc, pybind11, ninja and pytest.
#
#     FASTINIT_COMMIT=$(git rev-parse --short HEAD) benchmarks/gpu.sh [FOLDER [STEP...]]
#
# Writes FOLDER/<gpu>.json and FOLDER/gpu.log (default: benchmarks/results). Steps: build, info, verify,
# tests, memcheck, racecheck, benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
wanted=" ${*:2} "
failed=()

step() { # NAME COMMAND...
  local name=$1
  shift
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  echo "== $name"
  "$@" || failed+=("$name")
}

# Outside of the checkout, so that nothing that is not installed is found.
away() { (cd "$(mktemp -d)" && "$@"); }

main() {
  local gpu
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr -c 'A-Za-z0-9\n' - | tr A-Z a-z)
  step build env FORCE_CUDA=1 python3 -m pip install -q --no-deps --no-build-isolation --force-reinstall .
  step info away python3 -m fastinit info
  step verify away python3 -m fastinit verify --device cuda
  step tests timeout 240 python3 -m pytest -q -m cuda -p no:cacheprovider -W default
  # Without torch's pool, so that what lies behind a tensor is nobody's.
  for tool in memcheck racecheck; do
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no \
      python3 -m pytest -q -m sanitize -p no:cacheprovider -W default
  done
  step benchmark timeout 200 python3 benchmarks/gpu.py --json "$out/$gpu.json"
  echo "== failed: ${failed[*]:-nothing}"
  [ ${#failed[@]} -eq 0 ]
}

main 2>&1 | tee "$out/gpu.log"
