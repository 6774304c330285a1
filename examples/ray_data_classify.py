"""Label a data set with Ray Data's vLLM stage, on several replicas with early exit.

    pip install 'ray[data]'
    python examples/ray_data_classify.py --model MODEL --artifact policy --data rows.jsonl \
        --template $'Review: {text}\nSentiment:' --replicas 2 --cpus 0.5 --output labelled

`policy` is the output of `vllm-adainfer calibrate --labels ...`; the policy and the model need the
same path on every node. Each row is one request that may exit: one greedy token among the policy's
labels. The rows are written to the folder `--output` as JSON lines (Parquet if `--data` is), in any
order, with an added `answer`. Ray reserves `--cpus` for each replica and needs one more CPU to read
and write, without which it waits silently. On two cores, use two replicas of half a core each.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray.data.aggregate import Count, Max, Mean, Min
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

# For vLLM on CPUs; your own environment takes precedence.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" binds all replicas of a node to the same cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_WAIT_POLICY": "passive",
}


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[Path, typer.Option(help="Calibrated with --labels.")],
    data: Annotated[Path, typer.Option(help="A file: JSON lines, or .parquet.")],
    template: Annotated[
        str, typer.Option(help="Python format string over a row's fields, or @FILE.")
    ],
    output: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    replicas: Annotated[int, typer.Option()] = 2,
    cpus: Annotated[float, typer.Option(help="CPUs per replica.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows sent to a replica at once.")] = 32,
    stock: Annotated[bool, typer.Option("--stock", help="Without exits, for comparison.")] = False,
) -> None:
    """Write the rows with answers; print rows/s and, if they have a `label`, the accuracy."""
    if output.exists():
        raise typer.BadParameter(f"{output} exists already: choose another --output")
    if template.startswith("@"):  # a file keeps the line break at its end, $(cat FILE) does not
        template = Path(template[1:]).read_text()
    labels = json.loads((artifact / "config.json").read_text())["labels"]
    names = {label["token_id"]: label["name"] for label in labels}
    sampling = {"temperature": 0.0, "max_tokens": 1, "allowed_token_ids": list(names)}
    switch = {"additional_config": {"adainfer": {"artifact": str(artifact.absolute())}}}
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(max(1, int(cpus)))}
    config = vLLMEngineProcessorConfig(
        model_source=str(Path(model).absolute()) if Path(model).exists() else model,
        engine_kwargs={} if stock else switch,
        runtime_env={
            "env_vars": {key: os.environ.get(key, environment[key]) for key in environment}
        },
        concurrency=(replicas, replicas),  # a number N means from 1 to N
        placement_group_config={"bundles": [{"CPU": cpus}]},  # without it, a GPU per replica
        batch_size=batch_size,
        log_engine_metrics=False,  # needs ray[serve]
        # vLLM tokenises the prompts itself, and each of these stages would take more CPUs.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    is_parquet = data.suffix == ".parquet"
    source = str(data.absolute())
    rows = ray.data.read_parquet(source) if is_parquet else ray.data.read_json(source, lines=True)
    columns = rows.columns()

    def request(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": template.format_map(row), "sampling_params": sampling}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        given = {column: row[column] for column in columns}
        name, now = names[row["generated_tokens"][0]], time.time()
        notes = {"begun": now - row["time_taken_llm"], "done": now, "ok": row.get("label") == name}
        return {**given, "answer": name, **notes}

    # The first replica to start takes 16 blocks at once: small blocks leave work for the others.
    blocks = rows.repartition(target_num_rows_per_block=batch_size)
    start = time.time()
    answered = build_processor(config, preprocess=request, postprocess=answer)(blocks).materialize()
    totals = answered.aggregate(Count(), Min("begun"), Max("done"), Mean("ok"))
    result = answered.drop_columns(["begun", "done", "ok"])
    write = result.write_parquet if is_parquet else result.write_json
    write(str(output.absolute()), min_rows_per_file=100_000)

    seconds = totals["max(done)"] - totals["min(begun)"]
    typer.echo(f"{replicas} replicas had started after {totals['min(begun)'] - start:.0f} s")
    typer.echo(f"{totals['count()']} rows, {totals['count()'] / seconds:.1f} rows/s")
    if "label" in columns:
        typer.echo(f"accuracy {totals['mean(ok)']:.1%}")


if __name__ == "__main__":
    typer.run(main)
