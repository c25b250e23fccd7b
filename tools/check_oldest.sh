#!/usr/bin/env bash
# Builds a wheel with the headers of the oldest torch that is supported, then runs tests of the ops with the installed one.
#     tools/check_oldest.sh .venv/bin/python
# The headers come from torch's macOS wheel, 80 MB in place of a CUDA build's gigabytes; those that the extension
# includes are the same on every platform. It links with the installed torch, whose symbols are in no way used otherwise.
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
oldest=$("$python" -c 'import runpy; print(runpy.run_path("g2rl_kernels/versions.py")["TESTED"]["torch"][0])')

"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.11 \
  --platform macosx_11_0_arm64 --dest "$work" "torch==$oldest.*"
"$python" - "$work"/torch-*.whl "$work/old" <<'END'
import sys
import zipfile
wheel = zipfile.ZipFile(sys.argv[1])
wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.startswith("torch/include/")])
END

# The installed torch, by links, with the old headers in place of its own.
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
mkdir "$work/mixed"
cp -rs "$torch" "$work/mixed/torch"
rm -r "$work/mixed/torch/include"
mv "$work/old/torch/include" "$work/mixed/torch/include"
# A copy of the sources: the checkout's own build stays as it is.
mkdir "$work/sources"
cp -r setup.py pyproject.toml MANIFEST.in README.md LICENSE csrc g2rl_kernels benchmarks recipes "$work/sources"
rm -f "$work"/sources/g2rl_kernels/*.so
G2RL_CUDA=0 PYTHONPATH="$work/mixed" "$python" -m pip wheel --quiet --disable-pip-version-check --no-build-isolation \
  --no-deps --wheel-dir "$work" "$work/sources"
"$python" -m zipfile -e "$work"/g2rl_kernels-*.whl "$work/site"

cp -r tests pyproject.toml "$work/site"
cd "$work/site"
export OMP_NUM_THREADS=1 PYTHONPATH="$work/site"
"$python" - "$work" "$oldest" <<'END'
import sys
import torch
import g2rl_kernels
built = g2rl_kernels._C.build_info()["torch_built_with"]
assert g2rl_kernels.__file__.startswith(sys.argv[1]), g2rl_kernels.__file__
assert built.startswith(sys.argv[2] + "."), built
print(f"built with the headers of torch {built}, tested with torch {torch.__version__}")
END
"$python" -m pytest -q -p no:cacheprovider tests/head/test_head.py tests/head/test_linear_logprobs.py \
  tests/head/test_cpu.py tests/head/test_compile.py tests/group/test_group.py
