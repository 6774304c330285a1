#!/usr/bin/env bash
# Run every command of docs/tutorial.md in one shell; stop at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf .tutorial
trap 'jobs -p | xargs --no-run-if-empty kill' EXIT
set -m # jobs of their own, as at a prompt
# shellcheck disable=SC1090
source <(awk '/^```bash$/ { on = 1; print "printf \"\\n\" "; next } /^```$/ { on = 0 } on' docs/tutorial.md)
