#!/usr/bin/env bash
# zig cc: __builtin_cpu_supports is 0 for every instruction set, so dispatch at run time chooses the slowest code.
#
# Expected: zig cc is clang, so __builtin_cpu_supports("avx2") tells what this CPU has, and of a function's versions
#   target("avx2") and target("default") the first runs, as with gcc or clang.
# Observed: it is 0 for every name, also after __builtin_cpu_init(), and the default version runs. zig links a compiler
#   runtime of its own, whose __cpu_indicator_init is a stub that returns 0 and leaves __cpu_model zero. An object
#   compiled by gcc is affected as soon as zig links it. gcc's libgcc.a on the command line restores it.
# Why it matters: zig links Python wheels and programs for an older glibc. They work and pass their tests, but their
#   AVX code never runs. Older versions of zig refused to link (ziglang/zig issue 18074); now no step warns.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
if [ "$(uname -sm)" != "Linux x86_64" ] || ! grep -qw avx2 /proc/cpuinfo || ! command -v g++ >/dev/null; then
  echo "needs g++, and Linux on an x86-64 with AVX2" >&2
  exit 2
fi
python3 -m venv venv
venv/bin/pip install --quiet ziglang==0.17.1
export ZIG_GLOBAL_CACHE_DIR=$folder/cache ZIG_LOCAL_CACHE_DIR=$folder/cache
zig() { venv/bin/python -m ziglang "$@"; }

cat >program.cpp <<'PROGRAM'
#include <stdio.h>

__attribute__((target("default"))) const char *version() { return "default"; }
__attribute__((target("avx2"))) const char *version() { return "avx2"; }

int main() {
  __builtin_cpu_init();
  printf("sse2 %d, avx %d, avx2 %d; the version that runs: %s\n", !!__builtin_cpu_supports("sse2"),
         !!__builtin_cpu_supports("avx"), !!__builtin_cpu_supports("avx2"), version());
}
PROGRAM
g++ --version | head -1
echo "zig $(zig version)"

# show NAME EXPECTED: prints what the program NAME prints, and fails if that is not EXPECTED
show() {
  local seen
  seen=$("./$1")
  printf '%-38s %s\n' "$1" "$seen"
  [ "$seen" = "$2" ] || { echo "changed: expected '$2'" >&2; exit 1; }
}
everything="sse2 1, avx 1, avx2 1; the version that runs: avx2"
nothing="sse2 0, avx 0, avx2 0; the version that runs: default"
for level in -O0 -O2; do
  g++ $level program.cpp -o "gcc$level"
  zig cc $level program.cpp -o "zig$level"
  g++ $level -c program.cpp -o program.o
  zig cc program.o -o "gcc$level,linked-by-zig"
  zig cc program.o "$(g++ -print-file-name=libgcc.a)" -o "gcc$level,linked-by-zig-with-libgcc.a"
  show "gcc$level" "$everything"
  show "zig$level" "$nothing"
  show "gcc$level,linked-by-zig" "$nothing"
  show "gcc$level,linked-by-zig-with-libgcc.a" "$everything"
done
