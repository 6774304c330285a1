"""Parts of pages (most of `docs/results.md`) that quote the Markdown of a result as it stands."""

from __future__ import annotations

from benchmarks.front_page import RESULTS, load


def trained_probes_table() -> list[str]:
    """Students and branches, by task."""
    return [
        "A student (MiniLM, 22 M parameters) before the first layer, and branches, each in its "
        "policy even where it costs more time than it saves ([how](../benchmarks/README.md)):",
        "",
        *(RESULTS / "trained_probes.md").read_text().splitlines(),
    ]


def questions_table() -> list[str]:
    """One policy for a mixture of questions, also without one of them in calibration."""
    report, *_ = load("questions")
    return [
        f"One policy for eight questions of a decision endpoint, {report['n']} unseen requests "
        f"of {report['prompt_tokens_mean']:.0f} tokens, SmolLM2-135M fine-tuned for them, "
        f"epsilon {report['epsilon']:g}. Then layers saved and wrong answers by question, also "
        "for a policy that has not seen the question:",
        "",
        *(RESULTS / "questions.md").read_text().splitlines(),
    ]


def states_table() -> list[str]:
    """Several questions about one text."""
    report = load("states")
    return [
        "Questions about one state, sent together, when the state is new and again; milliseconds "
        f"until all are answered, stock / ours, {report['states']} states each (with the policy "
        "for the label alone):",
        "",
        *(RESULTS / "states.md").read_text().splitlines(),
    ]


def reranker_tables() -> list[str]:
    """A reranker over `/rerank`."""
    return [
        "A [reranker](rerankers.md) over `/rerank`, beside stock vLLM. It is a toy: SmolLM2-135M, "
        "trained for 20 minutes on 1,200 questions of BoolQ and SQuAD. It reorders what TF-IDF "
        "finds among 968 passages, cut to 64 words. *Lost one* is what the first policy promises; "
        "the second promises that at most epsilon of the scores *move*:",
        "",
        *(RESULTS / "rerank.md").read_text().splitlines(),
    ]


def classifier_tables() -> list[str]:
    """A classifier over `/classify`."""
    return [
        "A [classifier](classifiers.md) over `/classify`, whose head is the rows of the fine-tuned "
        "SmolLM2-135M's LM head for the labels:",
        "",
        *(RESULTS / "classify.md").read_text().splitlines(),
    ]


def monitor_tables() -> str:
    """How soon bounds close, and how often wrongly."""
    return (RESULTS / "monitor.md").read_text().rstrip("\n")


def promises_table() -> list[str]:
    """The best label, tolerances, gates, and promises about single labels, by task."""
    return [
        "What each [promise](promises.md) costs, fine-tuned SmolLM2-135M. *Broken* is the "
        "share of answers that break it; for recall, of all answers that change, and then of those "
        "that full depth answers with the label. One engine serves all policies of a task:",
        "",
        *(RESULTS / "promises.md").read_text().splitlines(),
    ]


def auto_tables() -> list[str]:
    """A server that calibrates itself, from its first request on."""
    return [
        "An empty directory, the same requests to [such a server](self_calibration.md) and to "
        "stock vLLM in turn. Both round in other batches, so some answers differ before a kind "
        "opens, too; the ledger compares within the same step. Layers saved are those of the "
        "latest 2,000 requests of all kinds.",
        "",
        *(RESULTS / "auto.md").read_text().splitlines(),
    ]


def ledger_tables() -> str:
    """The requests that a ledger lets exit, and when it closes a kind, by simulation."""
    return (RESULTS / "ledger.md").read_text().rstrip()
