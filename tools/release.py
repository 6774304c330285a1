"""Release the version of the package: check, write the notes, commit and tag. Nothing is uploaded.

    make release

`make dist` comes first: it builds, checks and installs the wheel, and serves the demo from it. What
is left is to push the commit and the tag, and to upload `dist/` with `twine upload`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import typer

UNRELEASED = "## [Unreleased]"
SECTION = re.compile(r"^## \[", re.MULTILINE)


def released(changelog: str, version: str, date: str) -> tuple[str, str]:
    """The changelog once `version` is released, and the notes of the release.

    Raises:
        SystemExit: nothing has changed since the last release, or it has this version already.

    """
    if f"## [{version}]" in changelog:
        sys.exit(f"CHANGELOG.md has a section for {version}: raise the version in __init__.py")
    before, _, rest = changelog.partition(UNRELEASED)
    following = SECTION.search(rest)
    notes = rest[: following.start() if following else None].strip()
    if not notes:
        sys.exit(f"CHANGELOG.md says nothing below {UNRELEASED}: say there what has changed")
    older = rest[following.start() :] if following else ""
    after = f"{before}{UNRELEASED}\n\n## [{version}] - {date}\n\n{notes}\n"
    return after + (f"\n{older}" if older else ""), f"{notes}\n"


def git(*arguments: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main(root: Path, version: str) -> None:
    """Release `version` from a clean checkout whose `dist/` holds its wheel."""
    if git("status", "--porcelain"):
        sys.exit("there are changes that are not committed: commit or drop them")
    if git("tag", "--list", f"v{version}"):
        sys.exit(f"there is a tag v{version} already: raise the version in __init__.py")
    if not [*(root / "dist").glob(f"vllm_adainfer-{version}-*.whl")]:
        sys.exit(f"dist has no wheel of {version}: run make dist")
    changelog = root / "CHANGELOG.md"
    date = datetime.now(UTC).date().isoformat()
    text, notes = released(changelog.read_text(), version, date)
    changelog.write_text(text)
    (root / "dist" / "NOTES.md").write_text(notes)
    git("commit", "--quiet", "--message", f"Release {version}", "CHANGELOG.md")
    git("tag", "--annotate", f"v{version}", "--message", f"Version {version}")
    typer.echo(f"v{version} is tagged; dist/NOTES.md has its notes. Left to do:")
    typer.echo(f"  git push origin main v{version}")
    typer.echo(f"  twine upload dist/vllm_adainfer-{version}*")


if __name__ == "__main__":
    from vllm_adainfer import __version__

    main(Path.cwd(), __version__)
