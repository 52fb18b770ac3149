#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without a network: builds the CUDA kernels, runs the tests
# marked `gpu`, then the benchmarks, whose results go to benchmarks/results and, if set, to $OUT.
#
# Uses the system's python3 if it has torch (it then also needs triton, pytest, pybind11,
# scikit-build-core and ninja; the installation goes to build/gpu-gate and leaves it as it is), else
# the .venv that `make install` makes.
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=(-C cmake.define.EIGENFILTER_CUDA=ON)
if python3 -c "import torch" 2>/dev/null; then
    python=python3
    site=$PWD/build/gpu-gate
    rm -rf "$site"
    "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$site" . "${cuda[@]}"
    export PYTHONPATH=$site
    eigenfilter=$site/bin/eigenfilter
else
    make install
    python=.venv/bin/python
    eigenfilter=.venv/bin/eigenfilter
    "$python" -m pip install --quiet --no-build-isolation --no-deps --editable . "${cuda[@]}"
fi

"$python" - <<'CHECK'
import eigenfilter, torch
from eigenfilter import _core

assert _core.cuda_compiled, "this build is without CUDA kernels"
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(f"eigenfilter {eigenfilter.__version__}, torch {torch.__version__}, "
      f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
CHECK

# pytest exits with 5, and so does this script, if no test is marked; none may be skipped for want of
# a GPU, which the check above has seen.
"$python" -m pytest tests -m gpu -p no:cacheprovider

results=benchmarks/results
before=$(mktemp)
export EIGENFILTER_TRITON_BLOCKS="$before.json"
"$eigenfilter" bench triton-blocks --device cuda --save --out "$results"
"$eigenfilter" bench --device cuda --out "$results"
"$eigenfilter" bench memory --device cuda --out "$results"
if [ -n "${EIGENFILTER_DATA:-}" ]; then
    "$eigenfilter" bench loop --model wrn-16-8 --batch-size 128 --device cuda --out "$results"
fi
if [ -n "${OUT:-}" ]; then
    find "$results" -name '*-cuda*' -newer "$before" -exec cp {} "$OUT" \;
fi
rm -f "$before" "$EIGENFILTER_TRITON_BLOCKS"
