#!/usr/bin/env bash
# Run every command of docs/tutorial.md, then those of README.md, in one shell; stop at the first
# that fails.
set -euo pipefail
cd "$(dirname "$0")/../.."
repository=$PWD
rm -rf .tutorial
trap 'jobs -p | xargs --no-run-if-empty kill' EXIT
set -m # jobs of their own, as at a prompt

commands() { awk -f "$repository/docs/hooks/commands.awk"; }

# shellcheck disable=SC1090
source <(commands < docs/tutorial.md)
wait

# README installs as the tutorial does, so begin after that. What it calls MODEL, train.jsonl and
# test.jsonl are the tutorial's, as is its template: without examples this model answers with a space
# first, which decides no choice. Its server runs until stopped: here beside the request that follows,
# and with less memory than vLLM takes of a whole machine.
mkdir .tutorial/readme
cd .tutorial/readme
demo=../../vllm_adainfer/offline/demo
ln -s ../model MODEL
ln -s $demo/calibration.jsonl train.jsonl
ln -s $demo/test.jsonl test.jsonl
curl() { command curl --silent --show-error --fail "$@"; }
export VLLM_CPU_KVCACHE_SPACE=1
eval "$(sed '1,/^## Quick start/d' ../../README.md | commands |
  sed "s#--template '[^']*'#--template @$demo/template.txt#" |
  sed 's/^\(vllm-adainfer serve [^#]*\).*/\1 > server.log 2>\&1 \&\
until curl 127.0.0.1:8000\/health 2> \/dev\/null; do sleep 2; kill -0 $!; done/')"
printf '\n'
kill %%
