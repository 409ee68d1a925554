#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU, in under nine minutes: build, the case table against float64, sanitizers,
# CUDA graphs, and the bench with both of torch's layouts. Nothing is installed or fetched.
#
#   bench/gpu.sh            everything
#   bench/gpu.sh build tests sanitizer probe bench     some of it
#
# Needs a Python (PYTHON, default python3) with torch, ninja and pytest, and nvcc. Figures go to
# bench/results/<device>/, a log of each step to $OUT (default build/gpu). A step that takes longer
# than its share is cut off and counts as failed; the steps after it still run.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
STEPS=${*:-build tests sanitizer probe bench}
mkdir -p "$OUT" build/gpu/site/voxconv
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$capability" = 90 ] && capability=90a
export VOXCONV_CUDA=1 VOXCONV_CUDA_ARCH=${VOXCONV_CUDA_ARCH:-$capability}
# The package as it would be installed: its two folders side by side.
for part in "$PWD"/python/voxconv/*; do ln -sfn "$part" build/gpu/site/voxconv/; done
ln -sfn "$PWD/triton_kernels" build/gpu/site/voxconv/triton_kernels
export PYTHONPATH="$PWD/build/gpu/site:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"

failed=()
step() {  # name, seconds, command...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  [[ " $STEPS " == *" ${name%%-*} "* ]] || return 0
  echo "== $name: $*"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  tail -n 12 "$OUT/$name.log"
  echo "== $name: exit $status after $((SECONDS - started)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

build() {
  "$PYTHON" setup.py -q build_ext --inplace &&
    ln -sfn "$PWD"/python/voxconv/_C.abi3.so build/gpu/site/voxconv/ && "$PYTHON" -m voxconv
}
export -f build
export PYTHON

step build 120 bash -c build
step tests 130 "$PYTHON" -m pytest -q -m "gpu or not gpu" -n 12 tests/test_gpu.py
for tool in memcheck racecheck; do
  step "sanitizer-$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" bench/gpu_smoke.py
done
step probe 20 "$PYTHON" bench/gpu_probe.py --json
step bench 175 "$PYTHON" bench/gpu_bars.py --json

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
