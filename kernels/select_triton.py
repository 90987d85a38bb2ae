"""Triton kernels of ``select``: scores of all chunks from their summaries, in one or two passes over the summaries.

Few query rows (a decode step): one pass stores the scores, which stay in the L2 cache, and ``topk.weigh_kernel`` turns
them into weights. Many rows (a prefill block): one pass sums the softmax's denominators, a second computes the same
scores again and adds up the weights, so that nothing of size [rows, chunks] is ever written.

Products run on tensor cores and stay as exact as float32: a query is split into two fp16 or three bf16 numbers that add
up to it, and the other factor is exact. A sketch's code x scale has at most 3 + 8 significant bits at 4 bits a code,
which fp16 holds; at 8 bits a code that product is split too. Scores are in base 2, and a sketch's q.mean is left out:
softmax does not see what all chunks of a row share.
"""

# Tuples of blocks grow, one for each product; Triton joins tuples, but does not unpack them.
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from kvtier.kernels.backend import jit, tl
from kvtier.kernels.topk import log_sum


@jit
def project_kernel(
    p_q,
    p_basis,
    p_out,
    p_factor,
    n_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    RANK: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Grid (row blocks, N). q @ basis, [N, R, RANK] float32 within -1..1, and what to multiply it with, [N, R]."""
    i_n = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d, o_k = tl.arange(0, BD), tl.arange(0, BK)
    m_r, m_d, m_k = o_r < n_rows, o_d < D, o_k < RANK
    i_row = i_n.to(tl.int64) * n_rows + o_r
    # [BR, BD], [BD, BK]
    b_q = tl.load(p_q + i_row[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
    o_basis = (i_n.to(tl.int64) * D + o_d[:, None]) * RANK + o_k[None, :]
    b_basis = tl.load(p_basis + o_basis, mask=m_d[:, None] & m_k[None, :], other=0.0)
    # [BR, BK]
    b_x = tl.dot(b_q, b_basis, input_precision="ieee")
    b_factor = tl.maximum(tl.max(tl.abs(b_x), axis=1), 1e-30)
    m_out = m_r[:, None] & m_k[None, :]
    tl.store(p_out + i_row[:, None] * RANK + o_k[None, :], b_x / b_factor[:, None], mask=m_out)
    tl.store(p_factor + i_row, b_factor * 1.4426950408889634, mask=m_r)


@jit
def _nibbles(b_bytes, b_scale_low, b_scale_high):
    """(nibble - 8) * scale for both nibbles of each byte, exact in fp16: 4 bytes in 14 instructions.

    Bits set in the mantissa of 1024.0 read as 1024 + nibble, for the upper one as 1024 + 16 nibble.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 x, y, a, low, sixteenth, high;
        mov.b32 low, 0x64086408;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 high, 0xD480D480;
        prmt.b32 x, $4, 0x64646464, 0x4140;
        prmt.b32 y, $4, 0x64646464, 0x4342;
        and.b32 a, x, 0xFF0FFF0F;
        sub.f16x2 a, a, low;
        mul.f16x2 $0, a, $5;
        and.b32 a, y, 0xFF0FFF0F;
        sub.f16x2 a, a, low;
        mul.f16x2 $1, a, $6;
        and.b32 a, x, 0xFFF0FFF0;
        fma.rn.f16x2 a, a, sixteenth, high;
        mul.f16x2 $2, a, $7;
        and.b32 a, y, 0xFFF0FFF0;
        fma.rn.f16x2 a, a, sixteenth, high;
        mul.f16x2 $3, a, $8;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [b_bytes, b_scale_low[:, None, :], b_scale_high[:, None, :]],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@jit
def _scales(
    p_scale,
    o_m,
    m_m,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    PACKED: tl.constexpr,
    BP: tl.constexpr,
    L: tl.constexpr,
    ASM: tl.constexpr,
):
    """Scales of chunks ``o_m`` within fp16's range, BP of them repeated: [BM, L] a plane, or one [BM, L, planes]."""
    o_p = tl.arange(0, L) % BP
    if ASM:
        scales = ()
        for plane in tl.static_range(8 // BITS):
            m_p = (o_p < PACKED) & (plane * PACKED + o_p < RANK)
            o_s = o_m[:, None] * RANK + (plane * PACKED + o_p)[None, :]
            b_scale = tl.load(p_scale + o_s, mask=m_m[:, None] & m_p[None, :], other=0.0)
            scales = scales + (tl.minimum(b_scale.to(tl.float32), 8000.0).to(tl.float16),)
    else:
        o_p = o_p[:, None] + (tl.arange(0, 8 // BITS) * PACKED)[None, :]
        m_p = (tl.arange(0, L) % BP < PACKED)[:, None] & (o_p < RANK)
        o_s = o_m[:, None, None] * RANK + o_p[None, :, :]
        b_scale = tl.load(p_scale + o_s, mask=m_m[:, None, None] & m_p[None, :, :], other=0.0)
        scales = tl.minimum(b_scale.to(tl.float32), 8000.0)
    return scales


@jit
def _bytes(
    p_codes,
    o_m,
    m_m,
    TOKEN: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    CT: tl.constexpr,
    BP: tl.constexpr,
):
    """Codes of tokens ``TOKEN`` .. ``TOKEN`` + CT of chunks ``o_m``, [BM, CT * BP] or [BM, CT, BP]."""
    if (PACKED == BP) & (CHUNK % CT == 0):
        o_b = o_m[:, None] * (CHUNK * PACKED) + (TOKEN * PACKED + tl.arange(0, CT * BP))[None, :]
        b_bytes = tl.load(p_codes + o_b, mask=m_m[:, None], other=0)
    else:
        o_c, o_p = TOKEN + tl.arange(0, CT), tl.arange(0, BP)
        o_b = o_m[:, None, None] * (CHUNK * PACKED) + (o_c[:, None] * PACKED + o_p[None, :])[None, :, :]
        m_b = m_m[:, None, None] & ((o_c < CHUNK)[:, None] & (o_p < PACKED)[None, :])[None, :, :]
        b_bytes = tl.load(p_codes + o_b, mask=m_b, other=0)
    return b_bytes


@jit
def _operand(b_bytes, scales, BITS: tl.constexpr, ASM: tl.constexpr):
    """Code * scale of bytes [BM, CT, L], exact: [BM, CT, L, planes], fp16 (if ASM) or float32."""
    if ASM:
        b_0, b_1 = _nibbles(b_bytes, scales[0], scales[1])
        b_x = tl.join(b_0, b_1)
    else:
        o_shift = (tl.arange(0, 8 // BITS) * BITS).to(tl.uint8)
        b_code = (b_bytes[:, :, :, None] >> o_shift[None, None, None, :]) & ((1 << BITS) - 1)
        b_x = (b_code.to(tl.float32) - (1 << (BITS - 1))) * scales[:, None, :, :]
    return b_x


@jit
def _query(p_q, i_n, n_rows, first, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """Rows ``first`` .. ``first`` + BR of p_q [N, R, K], transposed: [BK, BR]."""
    o_r, o_k = first + tl.arange(0, BR), tl.arange(0, BK)
    p_row = p_q + (i_n.to(tl.int64) * n_rows + o_r)[None, :] * K
    return tl.load(p_row + o_k[:, None], mask=(o_r < n_rows)[None, :] & (o_k < K)[:, None], other=0.0)


@jit
def _sketch_query(
    p_q,
    i_n,
    n_rows,
    first,
    RANK: tl.constexpr,
    PACKED: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    L: tl.constexpr,
    JOINED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Projected queries [N, R, RANK] from row ``first`` on as ``_sketch_scores`` multiplies them: [BK, BR].

    Column (part * ROWS + row) * JOINED + token is nonzero where the operand has codes of that token.
    """
    o_k, o_c = tl.arange(0, BK), tl.arange(0, BR)
    o_place = o_k % L
    o_place = o_place // 2 % 4 * (L // 4) + o_place // 8 * 2 + o_place % 2
    o_byte, o_token = o_place % (L // JOINED), o_place // (L // JOINED)
    o_rank = o_k // L * PACKED + o_byte
    o_r = first + o_c // JOINED % (BR // PARTS // JOINED)
    m_q = ((o_byte < PACKED) & (o_rank < RANK))[:, None] & (o_token[:, None] == (o_c % JOINED)[None, :])
    p_row = p_q + (i_n.to(tl.int64) * n_rows + o_r)[None, :] * RANK
    return tl.load(p_row + o_rank[:, None], mask=m_q & (o_r < n_rows)[None, :], other=0.0)


@jit
def _split(b_q, DTYPE: tl.constexpr, PARTS: tl.constexpr):
    """Parts of ``b_q`` [BK, BR] (float32) in DTYPE that add up to it: one, two or three matter.

    PARTS = 2: the right half of ``b_q`` repeats the left one; one operand, first parts on its left, second ones right.
    """
    b_high = b_q.to(DTYPE)
    b_rest = b_q - b_high.to(tl.float32)
    b_low = b_rest.to(DTYPE)
    b_least = (b_rest - b_low.to(tl.float32)).to(DTYPE)
    if PARTS == 2:
        b_high = tl.where(tl.arange(0, b_q.shape[1])[None, :] < b_q.shape[1] // 2, b_high, b_low)
    return b_high, b_low, b_least


@jit
def _dot(b_x, parts, b_acc, PARTS: tl.constexpr):
    """b_x @ (sum of ``parts``) + b_acc, the smallest part first."""
    if b_x.dtype == tl.float32:
        b_acc = tl.dot(b_x, parts[0], b_acc, input_precision="tf32x3")
    else:
        if b_x.dtype == tl.bfloat16:
            b_acc = tl.dot(b_x, parts[2], b_acc)
        if PARTS == 1:
            b_acc = tl.dot(b_x, parts[1], b_acc)
        b_acc = tl.dot(b_x, parts[0], b_acc)
    return b_acc


@jit
def _sketch_scores(
    b_bytes,
    scales,
    parts,
    TOKEN: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    CT: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    JOINED: tl.constexpr,
    PARTS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Largest score of each chunk over CT of its tokens for each block of rows, [BM, rows] each.

    JOINED tokens share a row of the product, with columns of their own: rows of 16 bytes, of which a thread's four are
    then neighbours. Place g * 8 + t * 2 + e of a row has byte t * L / 4 + g * 2 + e, for the same reason.
    """
    PLANES: tl.constexpr = 8 // BITS
    L: tl.constexpr = BK // PLANES
    CJ: tl.constexpr = CT // JOINED
    b_x = _operand(tl.reshape(b_bytes, [BM, CJ, L]), scales, BITS, ASM)
    b_x = tl.reshape(b_x, [BM, CJ, 4, L // 8, 2, PLANES])
    # [CJ * BM, BK]: the tokens of a chunk far apart, so that one thread holds many of them
    b_x = tl.reshape(tl.permute(b_x, (1, 0, 5, 3, 2, 4)), [CJ * BM, BK])
    b_high = b_x.to(tl.float16)
    b_low = (b_x - b_high.to(b_x.dtype)).to(tl.float16)
    scores = ()
    for i in tl.static_range(len(parts)):
        b_acc = tl.zeros([CJ * BM, BR], tl.float32)
        if BITS == 8:
            b_acc = tl.dot(b_low, parts[i][0], b_acc)
        b_acc = _dot(b_high, parts[i], b_acc, PARTS)
        if PARTS == 2:
            b_acc = tl.sum(tl.reshape(b_acc, [CJ * BM, 2, BR // 2]), axis=1)
        b_acc = tl.reshape(b_acc, [CJ, BM, BR // PARTS])
        if TOKEN + CT > CHUNK:
            o_token = TOKEN + (tl.arange(0, CJ) * JOINED)[:, None] + (tl.arange(0, BR // PARTS) % JOINED)[None, :]
            b_acc = tl.where((o_token < CHUNK)[:, None, :], b_acc, float("-inf"))
        scores = scores + (tl.max(b_acc, axis=0),)
    return scores


@jit
def _larger(scores, others):
    larger = ()
    for i in tl.static_range(len(scores)):
        larger = larger + (tl.maximum(scores[i], others[i]),)
    return larger


@jit
def _best_of_joined(scores, JOINED: tl.constexpr):
    """[BM, rows * JOINED] -> [BM, rows]."""
    best = ()
    for i in tl.static_range(len(scores)):
        b_s = tl.reshape(scores[i], [scores[i].shape[0], scores[i].shape[1] // JOINED, JOINED])
        best = best + (tl.max(b_s, axis=2),)
    return best


@jit
def _slab(p_table, i_m, slab, p_like):
    """Where the slab of chunk ``i_m`` begins. The hint must be on the pointer itself to make loads 16 bytes wide."""
    return tl.multiple_of(tl.load(p_table + i_m // slab).to(p_like.dtype), 16)


@jit
def score_kernel(
    p_q,
    p_factor,
    p_table0,
    p_table1,
    p_like0,
    p_like1,
    p_chunks,
    p_part,
    p_out,
    n_heads,
    n_rows,
    n_slabs,
    slab,
    capacity,
    KIND: tl.constexpr,
    PASS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    PACKED: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    CT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BR: tl.constexpr,
    JOINED: tl.constexpr,
    PARTS: tl.constexpr,
    BS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (splits, N, row groups). Scores of all chunks for BLOCKS x ROWS query rows, tile by tile of BM chunks.

    PASS "store" writes scores [N, R, capacity] and partial sums, "sum" partial sums alone, [2, N, R, splits]; "weigh"
    adds up the weights of a group's rows, [N, groups, capacity]. Slabs are [heads, slab, ...]; KIND "mean": q.x0;
    "minmax": min(q, 0).x0 + max(q, 0).x1; "cuboid": q.x0 + |q|.x1; "sketch": codes in x0, scales in x1, q projected.
    """
    i_p, i_n, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_splits = tl.num_programs(0)
    n = tl.load(p_chunks + i_n // n_heads)
    p_table0 += i_n // n_heads * n_slabs
    p_table1 += i_n // n_heads * n_slabs
    ROWS: tl.constexpr = BR // PARTS // JOINED
    DTYPE: tl.constexpr = tl.float16 if KIND == "sketch" else p_like0.dtype.element_ty
    L: tl.constexpr = BK * BITS // 8
    BP: tl.constexpr = L // JOINED
    o_k, o_tile = tl.arange(0, BK), tl.arange(0, BM)
    parts0, parts1, rows, factors, maxima, sums = (), (), (), (), (), ()
    for i in tl.static_range(BLOCKS):
        first = (i_g * BLOCKS + i) * ROWS
        o_r = first + tl.arange(0, ROWS)
        rows = rows + (o_r,)
        if KIND == "sketch":
            b_q = _sketch_query(p_q, i_n, n_rows, first, RANK, PACKED, BK, BR, L, JOINED, PARTS)
            factors = factors + (tl.load(p_factor + i_n * n_rows + o_r, mask=o_r < n_rows, other=0.0),)
        else:
            b_q = _query(p_q, i_n, n_rows, first, K, BK, BR) * 1.4426950408889634
        if KIND == "minmax":
            parts1 = parts1 + (_split(tl.maximum(b_q, 0.0), DTYPE, PARTS),)
            b_q = tl.minimum(b_q, 0.0)
        if KIND == "cuboid":
            parts1 = parts1 + (_split(tl.abs(b_q), DTYPE, PARTS),)
        parts0 = parts0 + (_split(b_q, DTYPE, PARTS),)
        if PASS == "weigh":
            b_lse = log_sum(p_part, i_n * n_rows + o_r, tl.num_programs(1) * n_rows, o_r < n_rows, n_splits, ROWS, BS)
            maxima = maxima + (b_lse,)
        else:
            maxima = maxima + (tl.full([BM, ROWS], -1e38, tl.float32),)
        sums = sums + (tl.zeros([BM, ROWS], tl.float32),)
    for begin in tl.range(i_p * BM, n, n_splits * BM, num_stages=STAGES):
        m_m = begin + o_tile < n
        o_m = (i_n % n_heads).to(tl.int64) * slab + begin % slab + o_tile
        p_x0 = _slab(p_table0, begin, slab, p_like0)
        p_x1 = p_x0
        if KIND != "mean":
            p_x1 = _slab(p_table1, begin, slab, p_like1)
        # [BM, ROWS] each
        if KIND == "sketch":
            scales = _scales(p_x1, o_m, m_m, BITS, RANK, PACKED, BP, L, ASM)
            b_bytes = _bytes(p_x0, o_m, m_m, 0, CHUNK, PACKED, BM, CT, BP)
            scores = _sketch_scores(b_bytes, scales, parts0, 0, CHUNK, BITS, BM, CT, BK, BR, JOINED, PARTS, ASM)
            for token in tl.static_range(CT, CHUNK, CT):
                b_bytes = _bytes(p_x0, o_m, m_m, token, CHUNK, PACKED, BM, CT, BP)
                more = _sketch_scores(b_bytes, scales, parts0, token, CHUNK, BITS, BM, CT, BK, BR, JOINED, PARTS, ASM)
                scores = _larger(scores, more)
            if JOINED > 1:
                scores = _best_of_joined(scores, JOINED)
        else:
            o_x = o_m[:, None] * K + o_k[None, :]
            m_x = m_m[:, None] & (o_k < K)[None, :]
            # [BM, BK]
            b_x0 = tl.load(p_x0 + o_x, mask=m_x, other=0.0)
            scores = ()
            for i in tl.static_range(BLOCKS):
                scores = scores + (_dot(b_x0, parts0[i], tl.zeros([BM, BR], tl.float32), PARTS),)
            if KIND != "mean":
                b_x1 = tl.load(p_x1 + o_x, mask=m_x, other=0.0)
                both = ()
                for i in tl.static_range(BLOCKS):
                    both = both + (_dot(b_x1, parts1[i], scores[i], PARTS),)
                scores = both
        tops, totals = (), ()
        b_w = tl.zeros([BM, ROWS], tl.float32)
        for i in tl.static_range(BLOCKS):
            b_s = scores[i]
            m_r = (rows[i] < n_rows)[None, :]
            if KIND == "sketch":
                b_s *= factors[i][None, :]
            if PASS == "weigh":
                b_w += tl.where(m_r, tl.exp2(b_s - maxima[i][None, :]), 0.0)
                tops, totals = maxima, sums
            else:
                b_s = tl.where(m_m[:, None], b_s, float("-inf"))
                b_top = tl.maximum(maxima[i], b_s)
                tops = tops + (b_top,)
                totals = totals + (sums[i] * tl.exp2(maxima[i] - b_top) + tl.exp2(b_s - b_top),)
            if PASS == "store":
                o_s = (i_n.to(tl.int64) * n_rows + rows[i])[None, :] * capacity + (begin + o_tile)[:, None]
                tl.store(p_out + o_s, b_s, mask=m_m[:, None] & m_r)
        if PASS == "weigh":
            o_w = (i_n * tl.num_programs(2) + i_g).to(tl.int64) * capacity + begin + o_tile
            tl.store(p_out + o_w, tl.sum(b_w, axis=1), mask=m_m)
        maxima, sums = tops, totals
    if PASS != "weigh":
        for i in tl.static_range(BLOCKS):
            # [ROWS]
            b_top = tl.max(maxima[i], axis=0)
            b_sum = tl.sum(sums[i] * tl.exp2(maxima[i] - b_top[None, :]), axis=0)
            p_top = p_part + (i_n * n_rows + rows[i]).to(tl.int64) * n_splits + i_p
            tl.store(p_top, b_top, mask=rows[i] < n_rows)
            tl.store(p_top + (tl.num_programs(1) * n_rows).to(tl.int64) * n_splits, b_sum, mask=rows[i] < n_rows)
