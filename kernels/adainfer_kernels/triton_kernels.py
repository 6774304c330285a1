"""Device code of `triton_probe`: one pass over the LM head; the logits never leave the chip.

    readout    lens and final norm of each row                      [rows, hidden]
    score      scores a part of the vocabulary for a block of rows  4 numbers per row and part
    shortlist  the same for each row's own candidates
    finish     joins the parts of a row, applies the linear classifier

A program that sees all candidates of its rows finishes them itself. kernels/README.md has the
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
    change_ptr,
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
    """One program per row: ``hidden + change + lens_bias``, then the norm, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < hidden_size
    x = tl.load(hidden_ptr + row * hidden_row_stride + k, mask=inside, other=0.0).to(tl.float32)
    if change_ptr is not None:
        x += tl.load(change_ptr + row * hidden_size + k, mask=inside, other=0.0).to(tl.float32)
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
    """What to subtract before an exponential: the maximum, or 0 if it is infinite."""
    return tl.where(tl.abs(top1) == INF, 0.0, top1)


@triton.jit
def _join(top1, top1_id, top2, total, other1, other1_id, other2, other_total):
    """Join two parts of a row; `total` is the sum of exp(score - _finite(top1))."""
    best = tl.maximum(top1, other1)
    best_id = tl.where(top1 > other1, top1_id, other1_id)
    best_id = tl.where(top1 == other1, tl.minimum(top1_id, other1_id), best_id)
    second = tl.maximum(tl.minimum(top1, other1), tl.maximum(top2, other2))
    shift = _finite(best)
    # A part without scores has total 0, which must not be scaled by an overflowing exponential.
    total = tl.where(top1 == -INF, total, total * tl.exp(_finite(top1) - shift))
    other_total = tl.where(
        other1 == -INF, other_total, other_total * tl.exp(_finite(other1) - shift)
    )
    return best, best_id, second, total + other_total


@triton.jit
def _shaped(scores, bias, soft_cap, scale):
    """Turn raw products into scores: bias, soft cap, scale."""
    scores = scores + bias
    if soft_cap is not None:
        scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0))  # tanh
    return scores * scale


@triton.jit
def _reduce(scores, ids, valid):
    """Reduce scores [rows, candidates] over the candidates; invalid ones do not count."""
    scores = tl.where(valid, scores, -INF)
    ids = tl.where(valid, ids, NO_ID_IN_KERNEL)
    # Maxima do not treat NaN alike everywhere, so it is kept out of them; it returns by the sum.
    ranked = tl.where(scores == scores, scores, -INF)
    top1 = tl.max(ranked, axis=1)
    top1_id = tl.min(tl.where(ranked == top1[:, None], ids, NO_ID_IN_KERNEL), axis=1)
    top2 = tl.max(tl.where(ids == top1_id[:, None], -INF, ranked), axis=1)
    total = tl.sum(tl.exp(scores - _finite(top1)[:, None]), axis=1)
    return top1, top1_id, top2, total


@triton.jit
def _store_result(
    row,
    inside,
    top1,
    top1_id,
    top2,
    total,
    id_ptr,
    top1_ptr,
    top2_ptr,
    lse_ptr,
    settled_ptr,
    classifier_ptr,
    threshold_ptr,
):
    lse = _finite(top1) + tl.log(total)
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
def _store_part(row, inside, part, parts, top1, top1_id, top2, total, part_ptr, part_id_ptr, rows):
    at = row * parts + part
    plane = rows.to(tl.int64) * parts
    tl.store(part_id_ptr + at, top1_id, mask=inside)
    tl.store(part_ptr + at, top1, mask=inside)
    tl.store(part_ptr + plane + at, top2, mask=inside)
    tl.store(part_ptr + 2 * plane + at, total, mask=inside)


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
    ROWS_UP_TO: tl.constexpr,  # the key of autotuning
    WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,  # for Triton's interpreter, whose dot takes bf16 for integers
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (row block, part): the part's share of `size` head rows for a block of rows."""
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
    total = tl.zeros([BLOCK_R], tl.float32)
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
            if WIDEN:
                x, w = x.to(tl.float32), w.to(tl.float32)
            products = tl.dot(x, w, products, input_precision="ieee")
            readout += BLOCK_K
            head += BLOCK_K * head_column_stride
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + v, mask=valid, other=0.0).to(tl.float32)[None, :]
        scores = _shaped(products, bias, soft_cap, scale)
        if scores_ptr is not None:
            at = row[:, None] * size + v[None, :]
            tl.store(scores_ptr + at, scores, mask=row_inside[:, None] & valid[None, :])
        ids = v
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + v, mask=valid, other=0).to(tl.int32)
        new1, new1_id, new2, new_total = _reduce(scores, ids[None, :], valid[None, :])
        top1, top1_id, top2, total = _join(
            top1, top1_id, top2, total, new1, new1_id, new2, new_total
        )
    if WHOLE:
        _store_result(
            row,
            row_inside,
            top1,
            top1_id,
            top2,
            total,
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
            row, row_inside, part, parts, top1, top1_id, top2, total, part_ptr, part_id_ptr, rows
        )


@triton.jit(do_not_specialize=["rows"])  # the batch changes at every step
def shortlist_kernel(
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
    vocabulary,
    WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (row, part): `BLOCK_V` of the row's own `size` candidates, gathered from the head."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    part = tl.program_id(1)
    row_inside = row < rows
    column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    ids = tl.load(ids_ptr + tl.program_id(0).to(tl.int64) * size + column, column < size, other=-1)
    valid = ids >= 0
    known = valid & (ids < vocabulary)
    k = tl.arange(0, BLOCK_K)
    head = head_ptr + ids[:, None] * head_row_stride + k[None, :] * head_column_stride
    readout = readout_ptr + tl.program_id(0).to(tl.int64) * readout_row_stride + k
    products = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    for done in range(0, hidden_size, BLOCK_K):
        k_inside = k < hidden_size - done
        w = tl.load(head, mask=known[:, None] & k_inside[None, :], other=0.0)
        x = tl.load(readout, mask=k_inside, other=0.0)
        products += w.to(tl.float32) * x.to(tl.float32)[None, :]
        head += BLOCK_K * head_column_stride
        readout += BLOCK_K
    scores = tl.sum(products, axis=1)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + ids, mask=known, other=0.0).to(tl.float32)
    scores = _shaped(scores, bias, soft_cap, scale)
    scores = tl.where(known, scores, tl.where(valid, float("nan"), -INF))[None, :]
    if scores_ptr is not None:
        at = row[:, None] * size + column[None, :]
        tl.store(scores_ptr + at, scores, mask=(column < size)[None, :])
    top1, top1_id, top2, total = _reduce(scores, ids.to(tl.int32)[None, :], valid[None, :])
    if WHOLE:
        _store_result(
            row,
            row_inside,
            top1,
            top1_id,
            top2,
            total,
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
            row, row_inside, part, parts, top1, top1_id, top2, total, part_ptr, part_id_ptr, rows
        )


@triton.jit(do_not_specialize=["rows"])  # the batch changes at every step
def finish_kernel(
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
    """One program per row: join its parts."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    inside = part < parts
    at = tl.program_id(0).to(tl.int64) * parts + part
    plane = rows.to(tl.int64) * parts
    ids = tl.load(part_id_ptr + at, mask=inside, other=NO_ID_IN_KERNEL)
    firsts = tl.load(part_ptr + at, mask=inside, other=-INF)
    seconds = tl.load(part_ptr + plane + at, mask=inside, other=-INF)
    totals = tl.load(part_ptr + 2 * plane + at, mask=inside, other=0.0)
    top1 = tl.max(firsts, axis=0)
    top1_id = tl.min(tl.where(firsts == top1, ids, NO_ID_IN_KERNEL), axis=0)
    rivals = tl.where(ids == top1_id, seconds, firsts)
    top2 = tl.max(rivals, axis=0)
    scaled = tl.where(firsts == -INF, totals, totals * tl.exp(_finite(firsts) - _finite(top1)))
    total = tl.sum(scaled, axis=0)
    _store_result(
        row,
        row < rows,
        top1,
        top1_id,
        top2,
        total,
        id_ptr,
        top1_ptr,
        top2_ptr,
        lse_ptr,
        settled_ptr,
        classifier_ptr,
        threshold_ptr,
    )
