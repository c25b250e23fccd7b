#!/usr/bin/env bash
# Installs the package as a user would (pip install ., with build isolation) in a fresh environment, then uses it from
# another folder.
#     tools/check_install.sh        PYTHON=... picks the interpreter
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
# pip's isolated build environment, where an unpinned torch may be gigabytes, reads this variable but not -c.
PIP_CONSTRAINT="$root/constraints.txt" "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$root"
cd "$work"
"$work/venv/bin/python" -W error::ImportWarning -c '
import g2rl_kernels
from pathlib import Path
assert Path(g2rl_kernels.__file__).is_relative_to(Path.cwd()), g2rl_kernels.__file__
import torch
members = torch.ops.g2rl.group_members(torch.tensor([7, 7, 3]))
assert members.tolist() == [[0, 1], [2, -1]], members
'
"$work/venv/bin/g2rl" info
