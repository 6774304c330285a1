"""docs/vllm_names.md lists every name of vLLM that the package touches, as the code is now."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import vllm_names
from vllm_source import Name, Source

VLLM = {
    "_version": "version = '0.40.1'",
    "__init__": 'MODULE_ATTRS = {"LLM": ".engine:LLM"}',
    "engine": "class LLM:\n    def generate(self): ...",
    "envs": "if TYPE_CHECKING:\n    VLLM_FLAG: bool = False",
    "config": "from .model import *",
    "model": """
        class ModelConfig:
            dtype: str

        class Config:
            def __init__(self, model: "ModelConfig | None"):
                self.model = model
        """,
    "scheduler": """
        from vllm.config import Config
        from vllm.platform import find

        class Base:
            def add(self): ...

        class Scheduler(Base):
            def __init__(self, config: Config):
                self.config: Config = config
        """,
    "platform": "class Platform:\n    name: str\n\ndef find() -> Platform: ...",
}
OURS = {
    "rooms/mixin.py": """
        if TYPE_CHECKING:
            from vllm.scheduler import Scheduler as _Scheduler

        class Mixin(_Scheduler):
            def add(self):
                self.own = self.config.model.dtype

            def ours(self):
                return self.own
        """,
    "rooms/build.py": """
        from vllm.config import Config
        from rooms.mixin import Mixin

        def build(config: Config | None, count: int):
            model = config.model
            model.gone = count
        """,
    "compat_all.py": '''
        from vllm import LLM, envs, platform

        def replaced():
            """Undocumented: `Base.add`, `Base.lost`."""
            from vllm.platform import find
            if envs.VLLM_FLAG and find().name:
                mock.patch.object(platform, "Platform", None)
            try:
                from vllm.engine import old
            except ImportError:
                from vllm.engine import new
        ''',
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def touches(tmp_path_factory) -> vllm_names.Touches:
    folder = tmp_path_factory.mktemp("sources")
    write(folder / "vllm", {f"{name}.py": text for name, text in VLLM.items()})
    return vllm_names.Touches(write(folder / "ours", OURS), Source(folder))


@pytest.mark.parametrize(
    ("module", "name", "how"),
    [
        ("vllm", "LLM", "imported"),
        ("vllm.scheduler", "Scheduler", "imported"),
        ("vllm.scheduler", "Base.add", "named, overridden"),
        ("vllm.scheduler", "Base.lost", "named"),
        ("vllm.scheduler", "Scheduler.config", "used"),
        ("vllm.model", "Config.model", "used"),
        ("vllm.model", "ModelConfig.dtype", "used"),
        ("vllm.model", "ModelConfig.gone", "set"),
        ("vllm.envs", "VLLM_FLAG", "used"),
        ("vllm.platform", "Platform.name", "used"),
        ("vllm.platform", "Platform", "replaced"),
        ("vllm.engine", "old", "imported if there"),
        ("vllm.engine", "new", "imported if there"),
    ],
)
def test_a_name_is_found_with_what_is_done_with_it(touches, module, name, how):
    assert ", ".join(sorted(touches.how[Name(module, name)])) == how


def test_what_is_ours_is_not_listed(touches):
    names = {found.name.rpartition(".")[2] for found in touches.how}
    assert not names & {"own", "ours", "Mixin", "build"}


@pytest.mark.parametrize(
    ("module", "name", "there"),
    [
        ("vllm", "LLM", True),
        ("vllm", "LLM.generate", True),
        ("vllm", "envs", True),
        ("vllm.config", "ModelConfig", True),
        ("vllm.scheduler", "Scheduler.add", True),
        ("vllm.scheduler", "Base.lost", False),
        ("vllm.gone", "LLM", False),
        ("vllm.engine", "old", False),
    ],
)
def test_a_version_has_a_name_wherever_it_is_defined(touches, module, name, there):
    assert (touches.source.find(Name(module, name)) is not None) == there


def test_other_arguments_than_in_the_version_of_the_types_are_said(touches, tmp_path):
    changed = {**VLLM, "engine": "class LLM:\n    def generate(self, prompts): ..."}
    later = Source(
        write(tmp_path / "vllm", {f"{n}.py": text for n, text in changed.items()}).parent
    )
    names = Name("vllm", "LLM.generate"), Name("vllm.engine", "LLM"), Name("vllm.engine", "old")
    found = [vllm_names.status(name, later, touches.source) for name in names]
    assert found == ["yes, other arguments", "yes", "**no**"]


@pytest.fixture(scope="module")
def source() -> Source:
    found = vllm_names.installed()
    if found.version != vllm_names.typed_by():
        pytest.skip(f"install vLLM {vllm_names.typed_by()}, whose types the list was made with")
    return found


def test_the_committed_list_is_that_of_the_code(source):
    assert vllm_names.PAGE.read_text() == vllm_names.page([source]), "run make vllm-names"


def test_the_installed_version_has_every_name_that_is_not_optional(source):
    lines = vllm_names.PAGE.read_text().splitlines()
    header, _, *rows = [line[2:-2].split(" | ") for line in lines if line.startswith("|")]
    column = header.index(source.version)
    missing = [row for row in rows if row[column] != "yes" and row[3] != "imported if there"]
    assert not missing
