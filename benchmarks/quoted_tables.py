"""Parts of pages (most of `docs/results.md`) that quote the Markdown of a result as it stands."""

from __future__ import annotations

from benchmarks.common.intervals import share_of
from benchmarks.front_page import RESULTS, load

SENTENCES = {
    "trained_probes": "A student (MiniLM, 22 M parameters) before the first layer, and branches, "
    "each in its policy even where it costs more time than it saves "
    "([how](../benchmarks/README.md)):",
    "coverage": "Policies made of other rows each time, by `calibrate`'s own steps at epsilon 0.02 "
    "and delta 0.1, and judged by the same unseen prompts: the early answer against full depth in "
    "the same pass ([how](../benchmarks/README.md)). So many unseen prompts measure a share within "
    "a per cent or so: a policy just below the bound may be counted as above it, or the reverse. "
    "*Clearly above* are those whose 95 % interval is.",
    "rerank": "A [reranker](rerankers.md) over `/rerank`, beside stock vLLM. It is a toy: "
    "SmolLM2-135M, trained for 20 minutes on 1,200 questions of BoolQ and SQuAD. It reorders what "
    "TF-IDF finds among 968 passages, cut to 64 words. *Lost one* is what the first policy "
    "promises; the second promises that at most epsilon of the scores *move*:",
    "classify": "A [classifier](classifiers.md) over `/classify`, whose head is the rows of the "
    "fine-tuned SmolLM2-135M's LM head for the labels:",
    "promises": "The cost of each [promise](promises.md), fine-tuned SmolLM2-135M. *Broken* is the "
    "share of answers that break it; for recall, of all answers that change, and then of those "
    "that full depth answers with the label. One engine serves all policies of a task:",
    "structured": "Objects and other [structured answers](structured.md), stock / ours, with "
    "ratios and their 95 % intervals over interleaved rounds "
    "([how](../benchmarks/README.md#structured-answers)). Then drafts: tokens and steps of an "
    "object alone, drafted tokens that are kept, and texts that differ. Last, steps whose drafts "
    "are all refused:",
    "objects": "Objects [under one bound](structured.md#objects-under-one-bound), epsilon 0.02, "
    "unseen requests of four schemas; *full depth* is drafts alone, 16 in flight. Then the time "
    "of an object beside stock's, and beside drafts alone: ratios and their 95 % intervals over "
    "interleaved rounds, throughput where it is not latency; two such benchmarks ran side by "
    "side, each on a core. The model never learnt the seven booleans, and stock's own answers "
    "change from batch to batch. They are why `calibrate` now refuses a policy whose wrong "
    "guesses waste more rows than early objects spare; this run was before "
    "([how](../benchmarks/README.md#objects-under-one-bound)):",
    "auto": "An empty directory, the same requests to [such a server](self_calibration.md) and to "
    "stock vLLM in turn. Both round in other batches, so some answers differ before a kind "
    "opens, too; the ledger compares within the same step. Layers saved are those of the "
    "latest 2,000 requests of all kinds.",
}


def quoted(name: str, sentence: str = "") -> list[str]:
    """The Markdown of a result, after a sentence about it."""
    return [sentence or SENTENCES[name], "", *(RESULTS / f"{name}.md").read_text().splitlines()]


def questions() -> list[str]:
    """One policy for a mixture of questions, also without one of them in calibration."""
    report, *_ = load("questions")
    return quoted(
        "questions",
        f"One policy for eight questions of a decision endpoint, {report['n']} unseen requests "
        f"of {report['prompt_tokens_mean']:.0f} tokens, SmolLM2-135M fine-tuned for them, "
        f"epsilon {report['epsilon']:g}. Then layers saved and wrong answers by question, also "
        "for a policy that has not seen the question:",
    )


def states() -> list[str]:
    """Several questions about one text."""
    return quoted(
        "states",
        "Questions about one state, sent together, when the state is new and again; milliseconds "
        f"until all are answered, stock / ours, {load('states')['states']} states each (with the "
        "policy for the label alone):",
    )


def families() -> list[str]:
    """OPT and Llama, as small models that the benchmark trains."""
    report = next(iter(load("families").values()))
    return quoted(
        "families",
        "Small OPT and Llama models, which the benchmark trains to say which part of this "
        f"repository a line is from; {report['n']} unseen prompts of "
        f"{report['prompt_tokens_mean']:.0f} tokens, delta {report['delta']:g}:",
    )


def long_prompts() -> list[str]:
    """Layers that share keys and values, where most prompt tokens stop."""
    report = next(iter(load("long_prompts").values()))
    length, changed = report["prompt_tokens_mean"], report["never_exit"]["disagreement_with_stock"]
    return quoted(
        "long_prompts",
        f"A small Gemma 4, a third of whose {report['layers_total']} layers share keys and "
        f"values, with {report['shots']} labelled lines before each prompt's own: {report['n']} "
        f"unseen prompts of {length:.0f} tokens, {report['provenance']['cpu']}. Prompt tokens that "
        "are not sampled stop where layers begin to share; never exiting differs from stock in "
        f"{share_of(changed, report['n'])} of the answers.",
    )


def recurrent() -> list[str]:
    """Layers with a recurrent state mixed with attention layers."""
    report = next(iter(load("recurrent").values()))
    length, changed = report["prompt_tokens_mean"], report["never_exit"]["disagreement_with_stock"]
    return quoted(
        "recurrent",
        "A small Qwen 3.5, nine of whose twelve layers keep a recurrent state: "
        f"{report['n']} unseen prompts of {length:.0f} tokens, {report['provenance']['cpu']}. "
        f"Never exiting differs from stock in {share_of(changed, report['n'])} of the answers.",
    )


def probabilities() -> list[str]:
    """Policies for label probabilities."""
    report, *_ = load("probabilities")
    return quoted(
        "probabilities",
        "Label probabilities, fine-tuned SmolLM2-135M, epsilon "
        f"{report['epsilon']:g} at delta {report['delta']:g}. The bound covers answers that change "
        "and probabilities that move by more than the tolerance. Stock's own probabilities also "
        "move, by rounding:",
    )
