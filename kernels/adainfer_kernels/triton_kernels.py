"""Device code of `triton_probe`: one pass over the LM head; the logits never leave the chip.

    readout      lens and final norm of each row                      [rows, hidden]
    score        scores a part of the vocabulary for a block of rows  4 numbers per row and part
    merge_parts  merges the parts of each row, applies the linear classifier

If there is a single part, the score kernel itself stores the result. kernels/README.md has the
formulas and the layout of the scratch tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adainfer_kernels.result import NO_ID

NO_ID_IN_KERNEL = tl.constexpr(NO_ID)
INF = tl.constexpr(float("inf"))


@triton.jit
def readout_kernel(
    hidden_ptr,
    product_ptr,
    lens_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    hidden_size,
    hidden_row_stride,
    eps,
    RMS: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per row: ``hidden + product + lens_bias``, then the norm, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < hidden_size
    x = tl.load(hidden_ptr + row * hidden_row_stride + k, mask=inside, other=0.0).to(tl.float32)
    if product_ptr is not None:
        x += tl.load(product_ptr + row * hidden_size + k, mask=inside, other=0.0).to(tl.float32)
    if lens_bias_ptr is not None:
        x += tl.load(lens_bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        x = tl.where(inside, x - tl.sum(x) / hidden_size, 0.0)
    if RMS or LAYER:
        x = x * tl.rsqrt(tl.sum(x * x) / hidden_size + eps)
    if weight_ptr is not None:
        x = x * tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden_size + k, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finite(top1):
    """The shift to subtract before an exponential: the maximum, or 0 if it is infinite."""
    return tl.where(tl.abs(top1) == INF, 0.0, top1)


@triton.jit
def _merge(top1, top1_id, top2, sum_exp, other1, other1_id, other2, other_sum_exp):
    """Merge two parts of a row; `sum_exp` is the sum of exp(score - _finite(top1))."""
    best = tl.maximum(top1, other1)
    best_id = tl.where(top1 > other1, top1_id, other1_id)
    best_id = tl.where(top1 == other1, tl.minimum(top1_id, other1_id), best_id)
    second = tl.maximum(tl.minimum(top1, other1), tl.maximum(top2, other2))
    shift = _finite(best)
    # The sum_exp of a part without scores is 0; an overflowing exponential must not scale it.
    sum_exp = tl.where(top1 == -INF, sum_exp, sum_exp * tl.exp(_finite(top1) - shift))
    other_sum_exp = tl.where(
        other1 == -INF, other_sum_exp, other_sum_exp * tl.exp(_finite(other1) - shift)
    )
    return best, best_id, second, sum_exp + other_sum_exp


@triton.jit
def _bias_cap_scale(scores, bias, soft_cap, scale):
    """Turn products into scores: bias, soft cap, scale."""
    scores = scores + bias
    if soft_cap is not None:
        scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0))  # tanh
    return scores * scale


@triton.jit
def _reduce(scores, ids, valid):
    """Reduce scores [rows, n] over the columns that are `valid`."""
    scores = tl.where(valid, scores, -INF)
    ids = tl.where(valid, ids, NO_ID_IN_KERNEL)
    # tl.max does not treat NaN alike on all targets, so NaN is kept out; sum_exp carries it.
    ranked = tl.where(scores == scores, scores, -INF)
    top1 = tl.max(ranked, axis=1)
    top1_id = tl.min(tl.where(ranked == top1[:, None], ids, NO_ID_IN_KERNEL), axis=1)
    top2 = tl.max(tl.where(ids == top1_id[:, None], -INF, ranked), axis=1)
    sum_exp = tl.sum(tl.exp(scores - _finite(top1)[:, None]), axis=1)
    return top1, top1_id, top2, sum_exp


@triton.jit
def _store_result(
    row,
    inside,
    top1,
    top1_id,
    top2,
    sum_exp,
    id_ptr,
    top1_ptr,
    top2_ptr,
    lse_ptr,
    settled_ptr,
    classifier_ptr,
    threshold_ptr,
):
    lse = _finite(top1) + tl.log(sum_exp)
    found = tl.where(top1_id == NO_ID_IN_KERNEL, -1, top1_id)
    tl.store(id_ptr + row, found.to(tl.int64), mask=inside)
    tl.store(top1_ptr + row, top1, mask=inside)
    tl.store(top2_ptr + row, top2, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    if classifier_ptr is not None:
        top_prob = tl.exp(top1 - lse)
        gap = top_prob - tl.exp(top2 - lse)
        score = top_prob * tl.load(classifier_ptr) + gap * tl.load(classifier_ptr + 1)
        score += tl.load(classifier_ptr + 2)
        threshold = tl.load(threshold_ptr + row, mask=inside, other=INF)
        tl.store(settled_ptr + row, score >= threshold, mask=inside)


@triton.jit
def _store_part(
    row, inside, part, parts, top1, top1_id, top2, sum_exp, part_ptr, part_id_ptr, rows
):
    at = row * parts + part
    plane = rows.to(tl.int64) * parts
    tl.store(part_id_ptr + at, top1_id, mask=inside)
    tl.store(part_ptr + at, top1, mask=inside)
    tl.store(part_ptr + plane + at, top2, mask=inside)
    tl.store(part_ptr + 2 * plane + at, sum_exp, mask=inside)


@triton.jit(do_not_specialize=["rows"])  # the batch changes at every step
def score_kernel(
    readout_ptr,
    head_ptr,
    ids_ptr,
    bias_ptr,
    soft_cap,
    scale,
    scores_ptr,
    part_ptr,
    part_id_ptr,
    id_ptr,
    top1_ptr,
    top2_ptr,
    lse_ptr,
    settled_ptr,
    classifier_ptr,
    threshold_ptr,
    rows,
    size,
    hidden_size,
    readout_row_stride,
    head_row_stride,
    head_column_stride,
    parts,
    ROWS_UP_TO: tl.constexpr,  # part of the autotuner's key
    SINGLE_PART: tl.constexpr,
    UPCAST: tl.constexpr,  # for Triton's interpreter, whose dot reads bf16 as integers
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (row block, part): score one part of the `size` head rows for a block of rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    part = tl.program_id(1)
    row_inside = row < rows
    # Equal shares, whole multiples of 16 rows so that loads stay aligned.
    share = tl.cdiv(tl.cdiv(size, parts), 16) * 16
    first = part * share
    last = tl.minimum(first + share, size)

    top1 = tl.full([BLOCK_R], -INF, tl.float32)
    top1_id = tl.full([BLOCK_R], NO_ID_IN_KERNEL, tl.int32)
    top2 = tl.full([BLOCK_R], -INF, tl.float32)
    sum_exp = tl.zeros([BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        valid = v < last
        k = tl.arange(0, BLOCK_K)
        readout = readout_ptr + row[:, None] * readout_row_stride + k[None, :]
        head = (
            head_ptr + v.to(tl.int64)[None, :] * head_row_stride + k[:, None] * head_column_stride
        )
        products = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for done in range(0, hidden_size, BLOCK_K):
            k_inside = k < hidden_size - done
            x = tl.load(readout, mask=row_inside[:, None] & k_inside[None, :], other=0.0)
            w = tl.load(head, mask=k_inside[:, None] & valid[None, :], other=0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            products = tl.dot(x, w, products, input_precision="ieee")
            readout += BLOCK_K
            head += BLOCK_K * head_column_stride
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + v, mask=valid, other=0.0).to(tl.float32)[None, :]
        scores = _bias_cap_scale(products, bias, soft_cap, scale)
        if scores_ptr is not None:
            at = row[:, None] * size + v[None, :]
            tl.store(scores_ptr + at, scores, mask=row_inside[:, None] & valid[None, :])
        ids = v
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + v, mask=valid, other=0).to(tl.int32)
        new1, new1_id, new2, new_sum_exp = _reduce(scores, ids[None, :], valid[None, :])
        top1, top1_id, top2, sum_exp = _merge(
            top1, top1_id, top2, sum_exp, new1, new1_id, new2, new_sum_exp
        )
    if SINGLE_PART:
        _store_result(
            row,
            row_inside,
            top1,
            top1_id,
            top2,
            sum_exp,
            id_ptr,
            top1_ptr,
            top2_ptr,
            lse_ptr,
            settled_ptr,
            classifier_ptr,
            threshold_ptr,
        )
    else:
        _store_part(
            row, row_inside, part, parts, top1, top1_id, top2, sum_exp, part_ptr, part_id_ptr, rows
        )


@triton.jit(do_not_specialize=["rows"])  # the batch changes at every step
def merge_parts_kernel(
    part_ptr,
    part_id_ptr,
    id_ptr,
    top1_ptr,
    top2_ptr,
    lse_ptr,
    settled_ptr,
    classifier_ptr,
    threshold_ptr,
    rows,
    parts,
    BLOCK_P: tl.constexpr,
):
    """One program per row: merge its parts."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    inside = part < parts
    at = tl.program_id(0).to(tl.int64) * parts + part
    plane = rows.to(tl.int64) * parts
    ids = tl.load(part_id_ptr + at, mask=inside, other=NO_ID_IN_KERNEL)
    firsts = tl.load(part_ptr + at, mask=inside, other=-INF)
    seconds = tl.load(part_ptr + plane + at, mask=inside, other=-INF)
    sums_exp = tl.load(part_ptr + 2 * plane + at, mask=inside, other=0.0)
    top1 = tl.max(firsts, axis=0)
    top1_id = tl.min(tl.where(firsts == top1, ids, NO_ID_IN_KERNEL), axis=0)
    rivals = tl.where(ids == top1_id, seconds, firsts)
    top2 = tl.max(rivals, axis=0)
    scaled = tl.where(firsts == -INF, sums_exp, sums_exp * tl.exp(_finite(firsts) - _finite(top1)))
    sum_exp = tl.sum(scaled, axis=0)
    _store_result(
        row,
        row < rows,
        top1,
        top1_id,
        top2,
        sum_exp,
        id_ptr,
        top1_ptr,
        top2_ptr,
        lse_ptr,
        settled_ptr,
        classifier_ptr,
        threshold_ptr,
    )
