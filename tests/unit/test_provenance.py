from __future__ import annotations

import sys

import pytest

from vllm_adainfer.offline.provenance import provenance


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/someone/models/smollm2", "smollm2"),
        ("--model=/home/someone/models/smollm2", "--model=smollm2"),
        ("sst2=/home/someone/policies/sst2", "sst2=sst2"),
        ("policies/sst2", "policies/sst2"),
        ("Review: {text}\nSentiment:", "Review: {text}\nSentiment:"),
        ("--rates=10,20", "--rates=10,20"),
    ],
)
def test_a_result_names_no_folder_of_the_machine_that_made_it(monkeypatch, word, kept):
    monkeypatch.setattr(sys, "argv", ["bench.py", word])
    assert provenance()["argv"] == ["bench.py", kept]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("fpu avx2 avx512f amx_bf16 amx_tile", "Xeon with AMX x 2"),
        ("fpu avx2 avx512f", "Xeon with AVX-512 x 2"),
        ("fpu avx2", "Xeon with AVX2 x 2"),
        ("fpu", "Xeon x 2"),
    ],
)
def test_a_result_names_the_best_instructions_of_its_processor(monkeypatch, tmp_path, flags, named):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(2 * f"processor\t: 0\nmodel name\t: Xeon\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr("vllm_adainfer.offline.provenance.CPUINFO", cpuinfo)
    assert provenance()["cpu"] == named
