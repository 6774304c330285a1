#!/usr/bin/env bash
# Run every command of docs/gateways.md in one shell; stop at the first that fails. They use what
# docs/tutorial.md leaves in .tutorial.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf .tutorial/audit .tutorial/ray_audit .tutorial/litellm .tutorial/ray
trap 'jobs -p | xargs --no-run-if-empty kill' EXIT
set -m # jobs of their own, as at a prompt

bash docs/hooks/make_ray_environment.sh .tutorial/ray
export VLLM_CPU_KVCACHE_SPACE=1 OMP_WAIT_POLICY=passive
# shellcheck disable=SC1090
source <(awk -f docs/hooks/commands.awk docs/gateways.md |
  sed 's#^pip install#source .tutorial/ray/bin/activate; &#')
wait
