"""Launch shapes: each gives the same result, and each compiles for a Hopper GPU to what it is for.

The second needs no GPU: Triton compiles for one without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adainfer_kernels import tuning
from adainfer_kernels.tuning import LaunchShape

from tests.kernels.oracle import DEVICE, check_probe, in_form, normal, states_and_head

ON_A_GPU = {*tuning.AUTOTUNED, tuning.SMALL_HEAD, tuning.FP32_HEAD}
SHAPES = sorted(ON_A_GPU if DEVICE == "cuda" else {*ON_A_GPU, tuning.INTERPRETED})


@pytest.mark.parametrize("form", ["full", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_shape_gives_the_same_result(shape, dtype, form, monkeypatch):
    if dtype == torch.float32 and DEVICE == "cuda" and shape != tuning.FP32_HEAD:
        pytest.skip("fp32 tiles of this shape are too large for a GPU")
    hidden, head = states_and_head(20, 700, 100, dtype)
    head, options = in_form(form, head, width=299, head_bias=normal(700, dtype=dtype))
    after = {"soft_cap": 8.0, "scale": 1.5}
    monkeypatch.setattr(tuning, "fixed_shape", lambda *arguments: shape)
    check_probe(hidden, head, {**options, **after, "norm": None}, "triton")


@pytest.mark.parametrize("most", [1, 2, 20, 64, 256])
def test_no_row_count_makes_triton_compile_anew_after_the_warm_up(most):
    """Triton compiles by bucket, and anew for an argument that is 1 or a multiple of 16."""

    def variant(rows: int) -> tuple[int, bool, bool]:
        return tuning.row_bucket(rows), rows == 1, rows % 16 == 0

    warm = {variant(rows) for rows in tuning.rows_to_compile_for(most)}
    assert warm == {variant(rows) for rows in range(1, most + 1)}


HOPPER, AMPERE, INTERPRETER = (9, 0), (8, 0), None
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "capability", "shape"),
    [
        *((rows, 128256, BF16, HOPPER, tuning.HOPPER[16]) for rows in (1, 16)),
        *((rows, 128256, BF16, HOPPER, tuning.HOPPER[32]) for rows in (17, 32)),
        *((rows, 128256, BF16, HOPPER, tuning.HOPPER[64]) for rows in (33, 64)),
        *((rows, 128256, BF16, HOPPER, tuning.HOPPER[128]) for rows in (65, 128, 129, 4096)),
        (1, 1025, FP16, HOPPER, tuning.HOPPER[16]),
        *((rows, 128256, FP32, HOPPER, tuning.FP32_HEAD) for rows in (1, 4096)),
        *((1, 2, dtype, HOPPER, tuning.SMALL_HEAD) for dtype in (BF16, FP16)),
        (4096, 1024, BF16, HOPPER, tuning.SMALL_HEAD),
        *((1, size, FP32, HOPPER, tuning.FP32_HEAD) for size in (2, 1024)),
        (64, 128256, BF16, AMPERE, None),
        (64, 128256, BF16, (10, 0), None),
        (64, 128256, FP32, AMPERE, tuning.FP32_HEAD),
        (64, 30, BF16, AMPERE, tuning.SMALL_HEAD),
        *((64, 128256, dtype, INTERPRETER, tuning.INTERPRETED) for dtype in (BF16, FP32)),
        (64, 30, BF16, INTERPRETER, tuning.SMALL_HEAD),
        (64, 30, FP32, INTERPRETER, tuning.FP32_HEAD),
    ],
)
def test_the_shape_follows_from_rows_size_dtype_and_device(rows, size, dtype, capability, shape):
    assert tuning.fixed_shape(rows, size, dtype, capability) == shape


@pytest.mark.parametrize("multiprocessors", [1, 2, 108, 132])
@pytest.mark.parametrize(
    "size", [1, 2, 15, 16, 17, 100, 1000, 1024, 1025, 4096, 32000, 50272, 128256, 151936]
)
def test_parts_fill_the_device_but_are_not_smaller_than_a_tile(size, multiprocessors):
    tile = 16 if size <= tuning.SMALL_HEAD_SIZE else 64
    tiles = -(-size // tile)
    assert tuning.parts_of(size, multiprocessors) == min(tiles, 2 * multiprocessors)


def score(rows: int, size: int = 128256, hidden: int = 4096, **case: object) -> dict:
    return {"kernel": "score", "rows": rows, "size": size, "hidden": hidden, **case}


READOUT = {"kernel": "readout", "size": 0, "hidden": 4096}
POOL = {"kernel": "pool", "rows": 2048, "size": 64, "hidden": 4096}
# The Llama-3 head for each number of rows that has a shape, and as many for which integers are
# specialised (1, multiples of 16); label heads; readouts; pooled states.
HEADS = {f"{rows} rows": score(rows) for rows in (1, 3, 16, 17, 32, 33, 64, 65, 128, 300)}
SMALL_HEADS = {
    "16 packed": score(64, 16, packed=True),
    "2 packed of one row": score(1, 2, packed=True),
    "1000 of a small head": score(64, 1000),
}
OTHERS = {
    **{f"{rows} rows with bias and cap": score(rows, everything=True) for rows in (1, 64, 128)},
    "2 packed in fp32": score(64, 2, dtype="float32", packed=True),
    "an fp32 head of one row": score(1, 32000, 576, dtype="float32"),
    "readouts": {**READOUT, "rows": 64},
    "a readout": {**READOUT, "rows": 1},
    "readouts after a lens": {**READOUT, "rows": 64, "everything": True},
    "wide readouts": {**READOUT, "rows": 64, "hidden": 8192},
    "pooled states": POOL,
    "pooled states with all inputs": {**POOL, "everything": True},
    "pooled narrow fp32 states": {**POOL, "hidden": 577, "dtype": "float32"},
    "pooled wide states": {**POOL, "hidden": 8192, "everything": True},
}
CASES = {**HEADS, **SMALL_HEADS, **OTHERS}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What each case launches on a Hopper GPU."""
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    try:
        ptxas = Path(compiler.get_ptxas(90).path)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.skip(f"Triton has no ptxas for sm_90 here: {error}")
    if not ptxas.exists():
        pytest.skip(f"Triton's ptxas for sm_90 is not at {ptxas}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(list(CASES.values())),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def kernels_of(compiled: dict[str, list[dict]], case: str) -> list[dict]:
    assert isinstance(compiled[case], list), compiled[case]
    return compiled[case]


@pytest.mark.parametrize("case", CASES)
def test_every_launch_compiles_for_hopper_without_spills(case, compiled):
    for kernel in kernels_of(compiled, case):
        assert kernel["spilt"] == 0, kernel


@pytest.mark.parametrize("case", [*HEADS, *SMALL_HEADS])
def test_bf16_heads_use_tensor_cores_and_copies_of_16_bytes(case, compiled):
    kernel = kernels_of(compiled, case)[0]
    assert kernel["name"] == "score_kernel"
    assert kernel["tensor cores"]
    assert kernel["async copies"] == [16]


@pytest.mark.parametrize("case", HEADS)
def test_as_many_programs_fit_a_multiprocessor_as_the_parts_ask_for(case, compiled):
    kernel = kernels_of(compiled, case)[0]
    programs = tuning.PARTS_PER_MULTIPROCESSOR if HEADS[case]["rows"] <= 64 else 1
    kib = 1024
    assert programs * (kernel["shared"] + 1 * kib) <= 228 * kib, "one KiB a program is the system's"
    registers = 32 * kernel["warps"] * (-(-kernel["registers"] // 8) * 8)
    assert programs * registers <= 64 * kib


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("64 rows", ["score_kernel", "merge_parts_kernel"]),
        ("16 packed", ["score_kernel"]),
        ("1000 of a small head", ["score_kernel", "merge_parts_kernel"]),
        ("readouts", ["readout_kernel"]),
        ("pooled states", ["scale_kernel", "pool_kernel"]),
    ],
)
def test_one_kernel_scores_and_one_merges_the_parts_if_there_are_several(case, names, compiled):
    assert [kernel["name"] for kernel in kernels_of(compiled, case)] == names


@pytest.mark.parametrize("rows", tuning.HOPPER)
def test_up_to_64_rows_enough_of_the_head_is_in_flight(rows):
    shape: LaunchShape = tuning.HOPPER[rows]
    in_flight = shape.block_v * shape.block_k * 2 * (shape.num_stages - 1)
    if rows <= 64:
        assert tuning.PARTS_PER_MULTIPROCESSOR * in_flight >= 64 * 1024
    assert shape.block_r == rows
