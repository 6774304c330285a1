"""The service and promise of a policy, in the words of logs, cards, reports and checks."""

from __future__ import annotations

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.scope import about_labels


def probes_in_words(config: ArtifactConfig) -> str:
    """Which probes decide, and after which layers."""
    branches = ", ".join(map(str, config.branches))
    return (
        f"{config.probe} probe after layers {', '.join(map(str, config.exit_points))} of "
        f"{config.layers}{f' (a branch after {branches})' if branches else ''}"
    )


def outputs_in_words(config: ArtifactConfig) -> str:
    """What requests ask for that the policy serves; goes on after "requests for"."""
    if config.choices:
        return f"a choice among {', '.join(repr(choice.text) for choice in config.choices)}"
    if config.objects is not None:
        fields = ", ".join(field.path for field in config.objects.fields)
        return f"a JSON object that decides {fields}"
    tokens = "one token" if config.max_tokens == 1 else "any number of tokens"
    if config.candidates != "labels":
        return tokens
    names = ", ".join(label.name.strip() for label in config.labels)
    if config.score_head == "sigmoid":
        return f"the score of a prompt, its probability of {config.labels[1].name}"
    if config.score_head is not None:
        what = "classes" if config.score_head == "sigmoids" else "class"
        return f"the {what} of a prompt among {names}"
    if config.label_pool:
        names = f"two or more of {names}"
    what = "among" if config.promise.serves_best else "that read probabilities among"
    return f"{tokens} {what} {names}"


def at_most(config: ArtifactConfig, epsilon: float | None = None) -> str:
    """The promise with this `epsilon`; None leaves it a name."""
    promise = config.promise
    number = "epsilon" if epsilon is None else f"{100 * epsilon:g} {promise.measure}"
    answers = "answers" if config.max_tokens == 1 else "tokens, each after the same text,"
    if config.objects is not None:
        answers = "objects, in any field,"
    return f"at most {number} {promise.bounded.format(answers=answers)}"


def promise_in_words(config: ArtifactConfig, epsilon: float) -> str:
    """The whole promise at `epsilon`: with what is wrong, and over which requests it holds."""
    promise = config.promise
    wrong = [f"wrong: {promise.words()}"] if promise.reads_probabilities else []
    over = []
    if config.by_question:
        over = [f"for each of {len(config.questions)} questions, others run all layers"]
    elif config.label_pool:
        over = ["over the mixture of questions it was calibrated on"]
    details = [f"confidence {1 - config.delta:.0%}", *wrong, *about_labels(config), *over]
    return f"{at_most(config, epsilon)} ({'; '.join(details)})"


def probabilities_in_words(config: ArtifactConfig) -> str:
    """Which requests for probabilities may exit, and what is right about them; "" if none may."""
    promise = config.promise
    if config.score_head is not None:
        return promise.right_about
    if not promise.reads_probabilities:
        return ""
    if config.objects is not None:
        said = ["requests with logprobs may exit, too", promise.right_about]
        return "; ".join(one for one in said if one)
    whole = (
        "requests for probabilities in the whole vocabulary (logprob_token_ids = the labels, as "
        "/generative_scoring and /v1/systemone send)"
    )
    among = (
        "greedy requests for those among the labels (allowed_token_ids = the labels, and logprobs) "
        "may exit on a server started with --logprobs-mode processed_logprobs, and run at full "
        "depth on any other"
    )
    if promise.serves_probabilities(in_vocabulary=True):
        said = [f"{whole} may exit", among, promise.right_about]
        return "; ".join(one for one in said if one)
    return f"the label mass is not certified, so {whole} run at full depth; {among}"
