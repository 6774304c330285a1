#!/usr/bin/env bash
# Make an environment for Ray in the folder $1. Ray is installed beside vLLM: it sees the packages of
# the environment whose Python this finds.
set -euo pipefail
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -m venv "$1"
ray=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir("%s")\n' "$packages" > "$ray/beside.pth"
