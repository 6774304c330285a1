"""Serve a model with early exit by Ray Serve LLM, on CPUs.

    pip install 'ray[data,serve]==2.60.0' jsonref
    python examples/ray_serve.py --model MODEL --artifact policy --name demo --cpus 0.5

`policy` is the output of `vllm-adainfer calibrate`; the policy and the model need the same path on
every node. Each replica is an engine of its own, which loads the plugin by its entry point. Ray
reserves `--cpus` for each engine and one CPU for the process that starts it: without them it waits.
On two cores, use one replica of half a core. `--audit DIR` says where each answer came from; all
replicas write there, each to files of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

# For vLLM on CPUs; your own environment takes precedence.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" binds all replicas of a node to the same cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_WAIT_POLICY": "passive",
}


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[Path, typer.Option()],
    name: Annotated[str, typer.Option(help="What requests call the model.")],
    replicas: Annotated[int, typer.Option()] = 1,
    cpus: Annotated[float, typer.Option(help="CPUs per engine.")] = 1.0,
    port: Annotated[int, typer.Option()] = 8000,
    audit: Annotated[Path | None, typer.Option(help="A folder for the audit.")] = None,
) -> None:
    """Serve vLLM's endpoints for completions and chats until stopped."""
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(max(1, int(cpus)))}
    source = str(Path(model).absolute()) if Path(model).exists() else model
    switch: dict[str, object] = {"artifact": str(artifact.absolute())}
    if audit is not None:
        switch["audit"] = {"directory": str(audit.absolute())}
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": source},
        engine_kwargs={"additional_config": {"adainfer": switch}},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": cpus}]},
        deployment_config={"num_replicas": replicas},
        runtime_env={
            "env_vars": {key: os.environ.get(key, environment[key]) for key in environment}
        },
    )
    # What passes requests on to the replicas takes a whole CPU by default.
    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
    serve.run(app, blocking=True)


if __name__ == "__main__":
    typer.run(main)
