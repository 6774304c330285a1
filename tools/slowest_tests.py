"""Write the slowest tests of the last runs, and the minutes of each run, into docs/testing.md.

    make slowest

The arguments are the files that pytest wrote with `--junitxml`.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.provenance import provenance

PAGE = Path(__file__).parents[1] / "docs" / "testing.md"
BEGIN, END = "<!-- slowest tests: make slowest -->\n", "<!-- end of the slowest tests -->\n"
SLOWEST = 30


def table(runs: list[Path]) -> str:
    """The table of the slowest tests of all `runs`, below a line that says how long each took."""
    lines, tests = [], []
    for run in runs:
        [suite] = ElementTree.parse(run).iter("testsuite")
        minutes, cases = float(suite.attrib["time"]) / 60, int(suite.attrib["tests"])
        lines.append(f"{run.stem}: {cases:,} cases in {minutes:.1f} minutes")
        tests += [
            (float(case.attrib["time"]), run.stem, case.attrib["classname"], case.attrib["name"])
            for case in suite.iter("testcase")
        ]
    rows = [
        {
            "seconds": f"{seconds:.0f}",
            "run": run,
            "test": f"`{place.rpartition('.')[2]}::{name}`",
        }
        for seconds, run, place, name in sorted(tests, reverse=True)[:SLOWEST]
    ]
    table = markdown_table(rows)
    return f"{'; '.join(lines)}; {provenance()['cpu']}, two workers.\n\n{table}\n"


def main(runs: list[Path]) -> None:
    """Replace the table in the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(runs)}\n{END}{after}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
