#!/usr/bin/env bash
# Run every command of docs/gateways.md in one shell; stop at the first that fails. They use what
# docs/tutorial.md leaves in .tutorial.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf .tutorial/audit .tutorial/ray_audit .tutorial/litellm .tutorial/ray
trap 'jobs -p | xargs --no-run-if-empty kill' EXIT
set -m # jobs of their own, as at a prompt

# Ray is installed beside vLLM: here into an environment that sees the packages of this one.
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -m venv .tutorial/ray
ray=$(.tutorial/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir("%s")\n' "$packages" > "$ray/beside.pth"

export VLLM_CPU_KVCACHE_SPACE=1 OMP_WAIT_POLICY=passive
# shellcheck disable=SC1090
source <(awk -f docs/hooks/commands.awk docs/gateways.md |
  sed 's#^pip install#source .tutorial/ray/bin/activate; &#')
wait
