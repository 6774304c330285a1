#!/usr/bin/env bash
# Make .venv: this project, vLLM's CPU build, and what the tests need. PYTHON selects the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}

fail() {
  printf 'set-up failed: %s\n' "$1" >&2
  exit 1
}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$python" --version) is not supported: set PYTHON to a Python 3.11 to 3.13"
[ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 4000000 ] ||
  fail "less than 4 GB of disk space is free: .venv needs about 3 GB"

[ -x .venv/bin/python ] || "$python" -m venv .venv ||
  fail "$python cannot make a virtual environment: install its venv module"

echo "setting up .venv (a few minutes the first time; log: .venv/setup.log)"
bash tools/install.sh .venv --constraint constraints.txt --editable '.[cpu,demo,dev]'
