#!/usr/bin/env bash
# Serve the model and the policy of a demo with an installed wheel, and ask one question.
#
#   bash tools/serve_check.sh ENVIRONMENT DEMO
#
# ENVIRONMENT is a virtual environment that has the wheel, DEMO what `vllm-adainfer demo` wrote there.
# It fails unless the answer is one of the two labels, and the server says that it left early.
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
text = "Arrived late and scratched, and the seller never wrote back."
labels = [label["token_id"] for label in json.load(open(sys.argv[1]))["labels"]]
body = {"model": "demo", "prompt": template.format(text=text), "max_tokens": 1, "temperature": 0}
print(json.dumps({**body, "allowed_token_ids": labels}))
END
)
curl --silent --show-error --fail "$server/v1/completions" -H 'Content-Type: application/json' \
  -d "$question" | grep --only-matching '"text":" *\(bad\|good\)"'
sleep 1 # the counters come a moment later
curl --silent --show-error --fail "$server/metrics" |
  grep '^adainfer:exit_layer_count.*policy="default"} 1.0'
curl --silent --show-error --fail "$server/metrics" |
  grep '^adainfer:layer_rows_skipped_total.*policy="default"}' | grep --invert-match ' 0.0$'
