"""Those tasks of the suite that most benchmarks of a single use have."""

from __future__ import annotations

from benchmarks.suite.tasks import load_suite

TASKS = {task.name: task for task in load_suite().select(("sst2", "cr", "subj", "trec"))}
