#!/usr/bin/env bash
# Run every command of docs/recipes in one shell; stop at the first that fails. The name of a page, such
# as guard, runs that one alone, with the model that an earlier run has left.
set -euo pipefail
cd "$(dirname "$0")/../.."
recipes=docs/recipes
trap 'jobs -p | xargs --no-run-if-empty kill' EXIT
set -m # jobs of their own, as at a prompt
export VLLM_CPU_KVCACHE_SPACE=1 OMP_WAIT_POLICY=passive

if [ $# = 0 ]; then
  rm -rf .recipes
  # The page that installs Ray comes last.
  set -- index guard routing judge moderation questions batch_labels
fi

ray=.recipes/batch_labels/ray # where that page installs Ray
for page; do
  printf '\n== %s\n' "$page"
  rm -rf .recipes/"$page"/{policy,labelled,ray}
  # shellcheck disable=SC1090
  source <(awk -f docs/hooks/commands.awk "$recipes/$page.md" |
    sed "s#^pip install#bash docs/hooks/make_ray_environment.sh $ray; source $ray/bin/activate; &#")
  wait
done
