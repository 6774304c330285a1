"""The checks of ``vllm-adainfer doctor --auto DIR``: the directory of a self-calibrating server."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.auto.directory import FREE_BYTES, KEPT_SECONDS, AutoDirectory, read_json
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.doctor.finding import Finding, fail, ok, skip
from vllm_adainfer.offline.reports.kinds import KindState, Watched, read_directory

OTHERS = 0o077  # bits of a mode that let other users in
DAYS = round(KEPT_SECONDS / 86400)


def examine_auto(root: str) -> Iterator[Finding]:
    """Check the directory `root` and its contents."""
    directory = AutoDirectory(root)
    try:
        watched = read_directory(root)
    except AdaInferError as error:
        yield fail(f"auto: {error}")
        return
    yield ok(
        f"auto: {watched.requests:,} requests to {watched.model}, of {len(watched.kinds)} kinds "
        "that recur"
    )
    yield from brought(watched)
    yield modes(directory)
    yield room(directory)
    yield trainer(directory)
    yield stale_rows(directory)
    yield quarantined(watched)
    yield weights(directory, watched)


def brought(watched: Watched) -> Iterator[Finding]:
    """What has become of each kind that has a ledger, and what that brought."""
    for one in watched.kinds:
        if (promise := one.promise()) is not None:
            numbers = f"layers saved {one.saved()}, compared {one.compared()}"
            yield ok(f"auto: {one.name}: {one.state()}; {numbers}. {promise}")
    if (promise := watched.promise_of_all()) is not None:
        yield ok(f"auto: {promise}")


def modes(directory: AutoDirectory) -> Finding:
    """May only the server's user read the directory? States of prompts count as prompts."""
    paths = [directory.root, *directory.root.rglob("*")]
    is_open = [path for path in paths if _mode(path) & OTHERS]
    if is_open:
        return fail(
            f"auto: other users may read {is_open[0]} ({len(is_open)} such paths), and states of "
            f"prompts count as prompts: chmod -R go= {directory.root}"
        )
    return ok(f"auto: only its user may read {directory.root}")


def _mode(path: Path) -> int:
    """The mode of a file; 0 for one that has gone, as drafts do, and for a link."""
    try:
        return 0 if path.is_symlink() else path.stat().st_mode
    except OSError:
        return 0


def room(directory: AutoDirectory) -> Finding:
    """Is there room for rows? Without, serving goes on, but nothing new is calibrated."""
    free = shutil.disk_usage(directory.root).free
    taken = 0
    for path in directory.root.glob("*/rows/*"):
        with suppress(OSError):  # the trainer has just deleted it
            taken += path.stat().st_size
    text = f"auto: recorded rows take {taken / 1e9:.2f} GB, and {free / 1e9:.1f} GB are free"
    if free >= FREE_BYTES:
        return ok(text)
    return fail(f"{text}: make room, below {FREE_BYTES >> 30} GiB no rows are recorded")


def trainer(directory: AutoDirectory) -> Finding:
    """Does a trainer run? It holds a lock for as long as it lives."""
    lock = directory.root / "trainer.lock"
    try:
        file = lock.open()
    except OSError:
        return skip("auto: no trainer has run here, as for a server that only watches")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            said = [lock, *directory.root.glob("*/trainer.json")]
            age = time.time() - max(path.stat().st_mtime for path in said)
            return ok(f"auto: a trainer runs; it last wrote {age / 60:.0f} minutes ago")
    return fail(
        "auto: no trainer runs, so nothing new is calibrated: restart the server, or start one "
        f"with vllm-adainfer autopilot {directory.root}"
    )


def stale_rows(directory: AutoDirectory) -> Finding:
    """Are there states of prompts beyond the age at which they are deleted?"""
    oldest = time.time() - KEPT_SECONDS
    stale = []
    for path in directory.root.glob("*/rows/*"):
        with suppress(OSError):  # it has just been deleted
            if path.lstat().st_mtime < oldest:
                stale.append(path)
    if stale:
        return fail(
            f"auto: {len(stale)} files of rows are older than {DAYS} days, such as {stale[0]}: "
            "start the server, which deletes them, or delete them yourself"
        )
    return ok(f"auto: no rows are older than {DAYS} days")


def quarantined(watched: Watched) -> Finding:
    """Is a policy quarantined because the server could not load it?"""
    bad = [one for one in watched.kinds if one.quarantined]
    if not bad:
        return ok("auto: no policy is quarantined")
    why = "; ".join(f"{one.name}: {_reason(one)}" for one in bad)
    return fail(
        f"auto: policies are quarantined ({why}): requests of these kinds run as before, and the "
        "server retries at least once an hour. Report this with the server's log if it persists"
    )


def weights(directory: AutoDirectory, watched: Watched) -> Finding:
    """Are the policies in service for the weights that the server serves?"""
    identity = read_json(directory.identity)
    served = identity.get("fingerprint") if isinstance(identity, dict) else None
    if served is None:
        return skip("auto: the weights are unknown, as for a server that only watches")
    others = [
        one.name for one in watched.kinds if _fingerprint(directory, one) not in (None, served)
    ]
    if others:
        return fail(
            f"auto: the policies of {', '.join(others)} are for other weights than those that are "
            "served: restart the server, which then calibrates anew"
        )
    return ok("auto: all policies in service are for the weights that are served")


def _fingerprint(directory: AutoDirectory, one: KindState) -> str | None:
    """That of the weights of a kind's policy; None if it has no policy that loads."""
    if one.serves is None:
        return None
    policy: Path = directory.policy(one.name, one.serves)
    try:
        return load_artifact_config(str(policy)).weights_fingerprint
    except AdaInferError:
        return None


def _reason(one: KindState) -> str:
    return str(one.quarantined.get("why") or "no reason given")
