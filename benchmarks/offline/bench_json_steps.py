r"""Schema-constrained JSON: in how many steps the grammar leaves only one legal token.

    .venv/bin/python benchmarks/offline/bench_json_steps.py --model MODEL --data texts.jsonl

Stock vLLM generates texts under each schema; xgrammar then replays them token by token and counts
how often exactly one token is legal, and how many tokens lie in text the grammar forces
(``find_jump_forward_string``). The plugin does not use this yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer
import xgrammar
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from benchmarks.common.report_files import write_report
from vllm_adainfer.offline.calibration.data.examples import read_rows
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.provenance import provenance

TEXT = {"type": "string", "maxLength": 60}
SECTIONS = ["business", "sports", "technology", "world"]
SCHEMAS: dict[str, dict[str, Any]] = {
    "a label": {"section": {"enum": SECTIONS}},
    "labels and numbers": {
        "section": {"enum": SECTIONS},
        "importance": {"type": "integer", "minimum": 1, "maximum": 5},
        "about_people": {"type": "boolean"},
    },
    "a summary": {
        "title": TEXT,
        "section": {"enum": SECTIONS},
        "people": {"type": "array", "items": TEXT, "maxItems": 2},
    },
}


def main(
    model: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="JSON lines with a `text`.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/json_steps.json"),
    texts: Annotated[int, typer.Option(min=1, help="Prompts per schema.")] = 40,
) -> None:
    """Measure, and write JSON and a Markdown table."""
    asked = [str(row.fields["text"]) for row in read_rows(data)[:texts]]
    rows = []
    for spaces in True, False:
        config = {"backend": "xgrammar", "disable_any_whitespace": not spaces}
        llm = LLM(model, max_model_len=1024, enforce_eager=True, structured_outputs_config=config)
        tokenizer = llm.get_tokenizer()
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=llm.model_config.get_vocab_size()
        )
        compiler = xgrammar.GrammarCompiler(info)
        for name, properties in SCHEMAS.items():
            schema = {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
            written = generated(llm, asked, schema)
            grammar = compiler.compile_json_schema(  # as vLLM 0.32 does
                json.dumps(schema),
                any_whitespace=spaces,
                separators=None if spaces else (",", ":"),
            )
            counts = [followed(grammar, info, tokenizer, tokens) for tokens in written]
            row = {key: sum(count[key] for count in counts) for key in counts[0]}
            rows.append({"schema": name, "any_whitespace": spaces, "texts": len(counts), **row})
        del llm
    report = {"model": Path(model).name, "rows": rows, "provenance": provenance()}
    write_report(output, report, table(report))


def generated(llm: LLM, texts: Sequence[str], schema: Mapping[str, Any]) -> list[list[int]]:
    """The tokens of the answers that finish on their own."""
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=160,
            structured_outputs=StructuredOutputsParams(json=dict(schema)),
        )
        for _ in texts
    ]
    content = "Describe this article as JSON with the keys {keys}.\n\n{text}"
    keys = ", ".join(schema["properties"])
    chats: list[Any] = [
        [{"role": "user", "content": content.format(keys=keys, text=text)}] for text in texts
    ]
    outputs = [request.outputs[0] for request in llm.chat(chats, params, use_tqdm=False)]
    return [list(one.token_ids) for one in outputs if one.finish_reason == "stop"]


def followed(grammar: Any, info: Any, tokenizer: Any, tokens: Sequence[int]) -> dict[str, int]:
    """Count the tokens of one answer, those that were the only legal one, and the forced ones.

    The grammar forces text, not tokens: a token counts as ``forced`` if it lies in a run of forced
    text that could have been written at once.
    """
    matcher = xgrammar.GrammarMatcher(grammar)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    alone = forced = 0
    pending = ""
    for token in tokens:
        xgrammar.reset_token_bitmask(mask)
        matcher.fill_next_token_bitmask(mask)
        allowed = np.unpackbits(mask.numpy().view(np.uint8))
        alone += int(np.count_nonzero(allowed) == 1)
        if not pending:
            pending = matcher.find_jump_forward_string()
        text = tokenizer.decode([token])
        if pending and pending.startswith(text):
            forced += 1
            pending = pending[len(text) :]
        else:
            pending = ""
        if not matcher.accept_token(token):
            raise RuntimeError("xgrammar rejects a token that vLLM generated")
    return {"tokens": len(tokens), "alone": alone, "forced": forced}


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per schema, with and without free whitespace."""
    return (
        markdown_table(
            [
                {
                    "schema": row["schema"],
                    "white space": "any" if row["any_whitespace"] else "none",
                    "texts": str(row["texts"]),
                    "tokens": str(row["tokens"]),
                    "one token allowed": f"{row['alone'] / row['tokens']:.0%}",
                    "text forced": f"{row['forced'] / row['tokens']:.0%}",
                }
                for row in report["rows"]
            ],
            text_columns=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
