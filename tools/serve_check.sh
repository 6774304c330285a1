#!/usr/bin/env bash
# Serve the model and the policy of a demo with an installed wheel, and ask a few questions.
#
#   bash tools/serve_check.sh ENVIRONMENT DEMO
#
# ENVIRONMENT is a virtual environment that has the wheel, DEMO what `vllm-adainfer demo` wrote there.
# It fails unless the answers are of the two labels, and the server says that some left early.
set -euo pipefail
environment=$1 demo=$2
export VLLM_CPU_KVCACHE_SPACE=1
python() { "$environment/bin/python" "$@"; }
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server=http://127.0.0.1:$port
log=$demo/server.log
trap 'kill "$!"; wait "$!" || true' EXIT

"$environment/bin/vllm-adainfer" serve "$demo/SmolLM2-135M-Instruct" --policy "$demo/artifact" \
  --served-model-name demo --host 127.0.0.1 --port "$port" > "$log" 2>&1 &
until curl --silent --fail "$server/health"; do
  sleep 2
  kill -0 "$!" || { tail "$log" >&2; exit 1; }
done

question=$(python -I - "$demo/artifact/config.json" <<'END'
import json
import sys
from importlib.resources import files

template = (files("vllm_adainfer.offline.demo") / "template.txt").read_text()
texts = (
    "Arrived late and scratched, and the seller never wrote back.",
    "A lovely evening: warm food, kind people, and music that we still hum.",
    "It broke on the first day, and the shop refused to help.",
)
labels = [label["token_id"] for label in json.load(open(sys.argv[1]))["labels"]]
prompts = [template.format(text=text) for text in texts]
body = {"model": "demo", "prompt": prompts, "max_tokens": 1, "temperature": 0}
print(json.dumps({**body, "allowed_token_ids": labels}))
END
)
curl --silent --show-error --fail "$server/v1/completions" -H 'Content-Type: application/json' \
  -d "$question" | grep --only-matching '"text":" *\(bad\|good\)"'
sleep 1 # the counters come a moment later
curl --silent --show-error --fail "$server/metrics" |
  grep '^adainfer:exit_layer_count.*policy="default"} [1-9]'
curl --silent --show-error --fail "$server/metrics" |
  grep '^adainfer:layer_rows_skipped_total.*policy="default"}' | grep --invert-match ' 0.0$'
