"""Lines on disk: who may read them, how many are kept, and what can go wrong."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import pytest

from tests.waiting import wait_for
from vllm_adainfer.engine.scheduler import line_files
from vllm_adainfer.engine.scheduler.line_files import LineFiles, check_directory, whole_lines
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Capture

QUEUED = 256


def files_in(
    directory: Path,
    limit: int = 100,
    engine: int = 0,
    queued: int = QUEUED,
    tells_lost: bool = False,
) -> LineFiles:
    settings = Capture(directory=str(directory), limit=limit)
    return LineFiles("capture", settings, engine, queued, tells_lost)


def write(directory: Path, numbers: range, limit: int = 100, engine: int = 0) -> None:
    """Numbered lines, written by an engine that then stops."""
    files = files_in(directory, limit, engine)
    for number in numbers:
        files.put({"number": number})
        while not files._queue.empty():
            time.sleep(0.001)
    files.close()


def kept(directory: Path) -> list[int]:
    """The numbers in a directory, in the order of its files."""
    lines = [line for path in sorted(directory.iterdir()) for line in path.open()]
    return [json.loads(line)["number"] for line in lines]


def test_only_this_user_may_read_the_files_and_a_directory_that_is_made(tmp_path):
    directory = tmp_path / "new" / "requests"
    write(directory, range(1))
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in directory.iterdir()] == [0o600]


def test_a_directory_that_is_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o750)
    write(tmp_path, range(1))
    assert tmp_path.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("limit", [1, 2, 9, 10, 25, 100])
def test_the_latest_requests_are_kept_and_never_more_than_the_limit(tmp_path, limit):
    write(tmp_path, range(230), limit)
    found = kept(tmp_path)
    assert found == list(range(230 - len(found), 230))
    assert limit - limit // 10 - limit % 10 <= len(found) <= limit
    assert len(list(tmp_path.iterdir())) <= max(10, limit // max(1, limit // 10))


def test_the_limit_holds_over_restarts_also_if_it_is_lowered(tmp_path):
    for start in range(0, 300, 30):
        write(tmp_path, range(start, start + 30))
        assert kept(tmp_path)[-30:] == list(range(start, start + 30))
        assert len(kept(tmp_path)) <= 100
    files_in(tmp_path, 40).close()
    assert 0 < len(kept(tmp_path)) <= 40


def test_engines_write_side_by_side_and_delete_nothing_of_each_other(tmp_path):
    write(tmp_path, range(1000, 1010), engine=1)
    write(tmp_path, range(150), engine=0)
    write(tmp_path, range(2000, 2010), engine=10)
    (tmp_path / "notes.txt").write_text("")
    write(tmp_path, range(150, 300), engine=0)
    (tmp_path / "notes.txt").unlink()
    found = kept(tmp_path)
    assert {*range(1000, 1010), *range(2000, 2010)} < set(found)
    assert sum(number < 1000 for number in found) <= 100


def test_two_servers_in_one_directory_never_write_to_the_same_file(tmp_path):
    both = [files_in(tmp_path, 1000) for _ in range(2)]
    for number in range(200):
        both[number % 2].put({"number": number})
    for files in both:
        files.close()
    assert sorted(kept(tmp_path)) == list(range(200))


def test_a_server_leaves_the_file_alone_that_another_writes(tmp_path):
    first = files_in(tmp_path, 20)
    first.put({"number": 0})
    wait_for(lambda: kept(tmp_path) == [0])
    [written] = tmp_path.iterdir()
    with written.open("ab") as file:
        file.write(b'{"number": ')
        file.flush()
        second = files_in(tmp_path, 20)
        file.write(b"1}\n")
    for number in range(100, 140):  # twice the limit
        second.put({"number": number})
    second.close()
    first.put({"number": 2})
    first.close()
    assert [number for number in kept(tmp_path) if number < 100] == [0, 1, 2]
    files_in(tmp_path, 10).close()
    assert not written.exists(), "nobody writes it any more"


def test_a_file_that_another_server_deletes_meanwhile_is_no_error(tmp_path, monkeypatch):
    write(tmp_path, range(3))
    [path] = tmp_path.iterdir()
    gone = tmp_path / "capture-0-000000.jsonl"
    monkeypatch.setattr(line_files, "_numbered", lambda *_: {0: gone, 1: path})
    files_in(tmp_path).close()
    assert kept(tmp_path) == [0, 1, 2]


WRITER = """
import sys
from vllm_adainfer.engine.scheduler.line_files import LineFiles
from vllm_adainfer.settings.engine import Capture

files = LineFiles("capture", Capture(directory=sys.argv[1], limit=10**6), 0, queued=256)
print("started", flush=True)
while True:
    files.put({"numbers": list(range(2000))})
"""


def test_lines_are_whole_after_a_kill_and_a_cut_one_is_removed_at_the_next_start(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    wait_for(lambda: any(path.stat().st_size > 1 << 20 for path in tmp_path.iterdir()))
    process.kill()
    process.wait()
    process.stdout.close()
    [path] = tmp_path.iterdir()
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
    assert all(json.loads(line)["numbers"] == list(range(2000)) for line in whole)
    path.write_bytes(b"\n".join([*whole, b'{"number": "cut o']))
    files_in(tmp_path, 10**6).close()
    assert path.read_bytes().splitlines() == whole
    assert path.read_bytes().endswith(b"\n")


def test_whole_lines_of_an_empty_file_are_none(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    assert whole_lines(path) == 0
    path.write_bytes(b'{"number"')
    assert (whole_lines(path), path.read_bytes()) == (0, b"")


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(
            line_files.logger, name, lambda text, *values: found.append(text % values)
        )
    return found


def test_a_full_queue_loses_lines_and_nobody_waits(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(LineFiles, "_write_all", lambda self: None)  # a disk that hangs
    files = files_in(tmp_path)
    begin = time.monotonic()
    for number in range(QUEUED + 3):
        files.put({"number": number})
    assert time.monotonic() - begin < 1
    assert files._queue.qsize() == QUEUED
    assert len(warnings) == 3  # vLLM's logger says one of them
    assert "some are lost" in warnings[0]


def test_an_audit_says_where_lines_were_lost(tmp_path, monkeypatch, warnings):
    may_write = Event()
    write = LineFiles._write
    monkeypatch.setattr(
        LineFiles, "_write", lambda self, line: (may_write.wait(), write(self, line))
    )
    files = files_in(tmp_path, queued=2, tells_lost=True)
    files.put({"number": 0})
    while not files._queue.empty():  # until the thread waits for the disk
        time.sleep(0.001)
    for number in range(1, 6):
        files.put({"number": number})
    may_write.set()
    files.close()
    [path] = tmp_path.iterdir()
    assert [json.loads(line) for line in path.open()] == [
        {"number": 0},
        {"lost": 3},
        {"number": 1},
        {"number": 2},
    ]


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: the kernel writes what fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def written(monkeypatch) -> Semaphore:
    """Is released each time that a line has been written, or could not be."""
    done, write = Semaphore(0), LineFiles._write

    def write_and_release(files: LineFiles, content: dict[str, Any]) -> None:
        try:
            write(files, content)
        finally:
            done.release()

    monkeypatch.setattr(LineFiles, "_write", write_and_release)
    return done


def test_a_full_disk_costs_lines_but_cuts_none_and_is_said_once(tmp_path, warnings, written):
    files = files_in(tmp_path)

    def put_and_wait(number: int) -> None:
        files.put({"number": number, "text": "x" * 300_000})
        assert written.acquire(timeout=60)

    with disk_full_after(1 << 20):
        for number in range(6):
            put_and_wait(number)
    assert kept(tmp_path) == [0, 1, 2]
    put_and_wait(6)
    files.close()
    assert kept(tmp_path) == [0, 1, 2, 6]
    assert len(warnings) == 1
    assert "could not be written" in warnings[0]


def test_a_line_that_is_no_json_does_not_stop_the_next_one(tmp_path, warnings):
    files = files_in(tmp_path)
    files.put({"number": object()})
    files.put({"number": 1})
    files.close()
    assert kept(tmp_path) == [1]
    assert len(warnings) == 1


def test_a_directory_that_is_taken_away_is_not_made_again(tmp_path, warnings):
    directory = tmp_path / "requests"
    files = files_in(directory)
    directory.rmdir()
    for number in range(3):
        files.put({"number": number})
    files.close()
    assert not directory.exists()
    assert len(warnings) == 1
    assert "No such file or directory" in warnings[0]


def test_a_place_that_cannot_be_written_to_is_refused_with_what_to_change(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    for directory in (place, place / "below", Path("/proc/requests")):
        with pytest.raises(AdaInferError, match=rf"cannot write to {directory} \(.+\): name a"):
            check_directory("capture", str(directory))


def test_files_of_another_kind_at_the_names_are_refused_at_the_start(tmp_path):
    (tmp_path / "capture-0-000001.jsonl").mkdir()
    with pytest.raises(AdaInferError, match=r"cannot write to .* \(Is a directory\)"):
        files_in(tmp_path)


def test_stopping_does_not_wait_for_a_disk_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(line_files, "CLOSE_SECONDS", 0.1)
    hang: Any = lambda self: time.sleep(30)  # noqa: E731
    monkeypatch.setattr(LineFiles, "_write_all", hang)
    files = files_in(tmp_path)
    begin = time.monotonic()
    files.close()
    assert time.monotonic() - begin < 5
