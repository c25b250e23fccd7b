#!/usr/bin/env bash
# Tests and benchmarks on a GPU, in one command and under ten minutes. Needs torch for CUDA, nvcc and a C++
# compiler; no network, no virtual environment. Installs nothing.
#
#     benchmarks/gpu.sh                                  tests and benchmarks, into benchmarks/results/gpu
#     PARTS="build sanitizers tune support head" benchmarks/gpu.sh    the other parts, in a second run
#     PARTS="build kernels head" benchmarks/gpu.sh       only these, where GPU time is scarce
#     OUT=elsewhere PYTHON=python3.12 benchmarks/gpu.sh
#     PYTHONPATH=$PWD/carried benchmarks/gpu.sh          with packages installed before, for this Python, by
#                                                        pip install --target carried --no-deps hypothesis sortedcontainers ...
#
# Parts, in order. Each has a time limit and a log; a failing part does not stop the next:
#   build       the extension in place, for this GPU's architecture only
#   info        g2rl info, nvidia-smi
#   kernels     tests/head on the GPU               } tests
#   suite       all other tests that depend on the device   } (those whose imports are installed)
#   memcheck, racecheck   compute-sanitizer on the kernels' small tests; only if named    } sanitizers
#   tune        g2rl tune for the first case, two minutes; only if named
#   support     both ops with 64 and 512 ids a token, beside all ids; only if named
#   head, logprobs, group, train    g2rl bench, JSON named after the GPU }
#   profile     time by kernel of one call in each mode        } bench
#   plots       pictures from the JSON                         }
# PARTS takes these names and those of the braces. PROFILE=1 adds a report of Nsight Compute or Systems.
# HEAD_ARGS, LOGPROBS_ARGS, GROUP_ARGS and TRAIN_ARGS replace the arguments of g2rl bench. LIMIT_head=200 moves a time limit.
#
# Exit status: 0, or 1 if a part failed. Parts that cannot run here are skipped, with the reason. Without a GPU
# the benchmarks run on the CPU, with few cases.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
PARTS=" ${PARTS:-build info tests bench} "
PARTS=${PARTS// tests / kernels suite }
PARTS=${PARTS// sanitizers / memcheck racecheck }
PARTS=${PARTS// bench / head logprobs group train profile plots }
# Time limits in seconds. The parts of a default run add up to less than ten minutes; LIMITS+= lists the others.
declare -A LIMITS=([build]=50 [info]=15 [kernels]=170 [suite]=60 [head]=110 [logprobs]=65 [group]=25 [train]=35 [profile]=25
  [plots]=15)
LIMITS+=([memcheck]=150 [racecheck]=150 [tune]=120 [support]=60 [ncu]=120 [nsys]=60)
ALL="build info kernels suite memcheck racecheck tune support head logprobs group train profile plots"
for part in $PARTS; do
  [[ " $ALL " == *" $part "* ]] || { echo "gpu.sh: no part '$part'; they are: $ALL (or tests, sanitizers, bench)" >&2; exit 2; }
done
mkdir -p "$OUT"
[[ -n ${CUDA_HOME:-} || ! -d /usr/local/cuda ]] || export CUDA_HOME=/usr/local/cuda
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
G2RL=("$PYTHON" -m g2rl_kernels)
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if ! has torch; then
  echo "gpu.sh: $PYTHON has no torch: name an interpreter that has it in PYTHON=..." >&2
  exit 2
fi
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ -n $GPU ]]; then
  NAME=gpu-$(tr -cs 'a-z0-9\n' '-' <<<"${GPU,,}" | sed 's/-*$//')
  # "a" is what Hopper's wgmma needs; code for 120 runs on 121, which fewer nvcc know. AMD's GPUs have a
  # capability too, but no nvcc.
  export G2RL_CUDA_ARCHS=${G2RL_CUDA_ARCHS:-$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{0 if major == 12 else minor}" + "a" * (major == 9))')}
  "$PYTHON" -c 'import sys, torch; sys.exit(torch.version.hip is None)' && export G2RL_CUDA=0
else
  NAME=cpu
  NO_GPU="torch sees no GPU"
fi

# --- running a part -----------------------------------------------------------------------------------------

SUMMARY="$OUT/summary.md"
printf '%s, %s\n\n| part | status | seconds | log |\n|---|---|---|---|\n' "${GPU:-no GPU}" "$(date +%F)" >"$SUMMARY"
FAILED=0

row() { echo "| $1 | $2 | $3 | $4 |" >>"$SUMMARY"; }
wanted() { [[ $PARTS == *" $1 "* ]]; }
skip() { # part, reason
  echo "== $1: skipped, $2"
  row "$1" "skipped: $2" "" ""
}
run() { # part, command
  local part=$1 limit_name=LIMIT_$1 start=$SECONDS status code
  local limit=${!limit_name:-${LIMITS[$1]}}
  shift
  echo "== $part (at most $limit s)"
  timeout -s INT -k 20 "$limit" "$@" >"$OUT/$part.log" 2>&1  # INT: pytest then prints its results so far
  code=$?
  case $code in
    0) status=ok ;;
    124 | 137) status="FAILED: out of time, $limit s" ;;
    *) status="FAILED: exit status $code" ;;
  esac
  if ((code)); then
    FAILED=1
    tail -n 15 "$OUT/$part.log" | sed 's/^/   | /'
  fi
  echo "   $status"
  row "$part" "$status" $((SECONDS - start)) "$part.log"
}

# --- build and tests ----------------------------------------------------------------------------------------

if wanted build; then
  run build "$PYTHON" setup.py build_ext --inplace
fi

info() {
  "${G2RL[@]}" info || return
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu --format=csv
  fi
}
if wanted info; then
  export -f info
  export PYTHON
  run info bash -c 'G2RL=("$PYTHON" -m g2rl_kernels); info'
fi

PYTEST=("$PYTHON" -m pytest -q -ra --durations=15)
has pytest || NO_TESTS="pytest is not installed"
if [[ -z ${NO_TESTS:-} ]]; then
  # A test file that imports a missing package would end the whole run.
  mapfile -t MISSING < <("$PYTHON" benchmarks/missing_imports.py tests)
  for line in ${MISSING[@]+"${MISSING[@]}"}; do
    file=${line%%:*}
    [[ $file == */conftest.py ]] && PYTEST+=(--noconftest) || PYTEST+=("--ignore=$file")
    if wanted kernels || wanted suite; then echo "   left out: $line"; fi
  done
  KERNEL_TESTS=0
  for file in tests/head/kernels/test_*.py; do
    [[ " ${PYTEST[*]} " == *" --ignore=$file "* ]] || KERNEL_TESTS=1
  done
  WORKERS=1 PARALLEL=()
  has xdist && WORKERS=$(($(nproc) < 8 ? $(nproc) : 8)) PARALLEL=(-n "$WORKERS")
  # By default each worker would start one thread a core.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / WORKERS))}
fi
for part in kernels suite memcheck racecheck; do
  wanted $part || continue
  if [[ -n ${NO_GPU:-${NO_TESTS:-}} ]]; then
    skip $part "${NO_GPU:-$NO_TESTS}; make test runs all tests that need no GPU"
    continue
  fi
  if [[ $part == suite ]]; then
    cpu_only=(tests/{head/kernels,bench,packaging,cli,docs,evaluation,geometry,integrations,models,tasks,verl}
      tests/head/test_{sharded,vocab_parallel}.py tests/group/test_group_kernel.py tests/trainer/test_[!o]*.py)
    run suite "${PYTEST[@]}" "${PARALLEL[@]}" tests "${cpu_only[@]/#/--ignore=}"
  elif [[ $part == kernels ]]; then
    if ((KERNEL_TESTS)); then
      # tests that compile for other architectures need no GPU: make test runs them
      run kernels "${PYTEST[@]}" "${PARALLEL[@]}" tests/head/kernels tests/group/test_group_kernel.py
    else
      skip kernels "its tests need what is not installed"
    fi
  else
    tool=$(PATH="$PATH:${CUDA_HOME:-}/bin" command -v compute-sanitizer)
    if [[ -z $tool ]]; then
      skip $part "compute-sanitizer is not there"
      continue
    fi
    if ((KERNEL_TESTS)); then
      small=("${PYTEST[@]}" tests/head/kernels tests/group/test_group_kernel.py -k small)
    else
      small=("${G2RL[@]}" bench head --shapes tiny --N 200 --methods g2rl --rounds 1)
    fi
    # Without torch's memory cache, a byte past the end of a tensor is past the end of an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run $part "$tool" --tool $part --error-exitcode 9 "${small[@]}"
  fi
done

# --- benchmarks ---------------------------------------------------------------------------------------------

bench() { # part, the variable that replaces its arguments, the suffix of its JSON file, its arguments
  local part=$1 name=$2 suffix=$3
  shift 3
  local -a arguments
  read -ra arguments <<<"${!name:-$*}"
  run "$part" "${G2RL[@]}" bench "$part" "${arguments[@]}" --out "$OUT/$NAME$suffix.json"
}
if [[ -n $GPU ]]; then
  head=(--budget 85) logprobs=(--budget 50) group=(--budget 20) train=(--budget 30)
  profile=(--quick --methods g2rl all)
else
  head=(--quick --device cpu) logprobs=("${head[@]}") group=("${head[@]}") train=("${head[@]}")
  profile=(--quick --device cpu --methods g2rl 64)
fi
if wanted tune; then
  if [[ -z $GPU ]]; then
    skip tune "$NO_GPU"
  else
    run tune "${G2RL[@]}" tune --vocab 151936 --hidden 2048
  fi
fi
if wanted support; then
  if [[ -z $GPU ]]; then
    skip support "$NO_GPU"
  else
    run support "$PYTHON" -m benchmarks.support  # the table is in its log
  fi
fi
! wanted head || bench head HEAD_ARGS "" "${head[@]}"
! wanted logprobs || bench logprobs LOGPROBS_ARGS -logprobs "${logprobs[@]}"
! wanted group || bench group GROUP_ARGS -group "${group[@]}"
if wanted train; then
  if has transformers; then
    bench train TRAIN_ARGS -train "${train[@]}"
  else
    skip train "transformers is not installed"
  fi
fi
if wanted profile; then
  read -ra arguments <<<"${HEAD_ARGS:-${profile[*]}}"
  run profile "${G2RL[@]}" bench head "${arguments[@]}" --rounds 1 --no-error --profile "$OUT/kernel-times.txt"
fi
if [[ ${PROFILE:-} == 1 && -n $GPU ]]; then
  small=("${G2RL[@]}" bench head --quick --methods g2rl --rounds 1 --no-error)
  if command -v ncu >/dev/null; then
    run ncu ncu --set full --kernel-name 'regex:head_|group_' --launch-count 12 -f -o "$OUT/ncu" "${small[@]}"
  elif command -v nsys >/dev/null; then
    run nsys nsys profile --force-overwrite true -o "$OUT/nsys" "${small[@]}"
  else
    skip ncu "neither ncu nor nsys is there"
  fi
fi
if wanted plots; then
  if [[ ! -s $OUT/$NAME.json ]]; then
    skip plots "there is no $NAME.json"
  elif has matplotlib; then
    run plots "${G2RL[@]}" bench plot "$OUT/$NAME.json" --out "$OUT/$NAME.png"
  else
    skip plots "matplotlib is not installed; elsewhere: g2rl bench plot $NAME.json --out $NAME.png"
  fi
fi
# The tables of this run, and of earlier runs whose JSON is in the folder.
mapfile -t RESULTS < <(find "$OUT" -maxdepth 1 -name "$NAME*.json" | sort)
if ((${#RESULTS[@]})); then
  "${G2RL[@]}" bench table "${RESULTS[@]}" >"$OUT/$NAME.md" || FAILED=1
fi

echo
cat "$SUMMARY"
exit $FAILED
