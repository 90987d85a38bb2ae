"""Weights of all chunks from their scores, and exactly the ``select`` largest of them, without a sort.

A fixed number of programs per KV head turns scores into weights and keeps the largest weight of every GROUP chunks. The
last program to finish (an integer counter says which) chooses: each of the k largest weights lies in one of the k
groups with the largest maxima, so two searches of a few thousand numbers replace one of all chunks, and their work is
bounded whatever the weights are: chunks / GROUP, then k x GROUP. A search fixes the k-th largest value two bits at a
time; what lies above it is compacted in order of position, so the answer comes out sorted, and ties go to the lower
index. No float atomics: the same answer on every run.
"""

from kvtier.kernels.backend import jit, tl


@jit
def _bits(p_x, p_map, o_x, n, limit, MAPPED: tl.constexpr, GROUP: tl.constexpr):
    """Weights at places ``o_x`` below ``n`` as integers that order as they do; -1 where there is none."""
    m_x = o_x < n
    if MAPPED:
        o_x = tl.load(p_map + o_x // GROUP, mask=m_x, other=0) * GROUP + o_x % GROUP
        m_x = m_x & (o_x < limit)
    return tl.load(p_x + o_x, mask=m_x, other=-1.0).to(tl.int32, bitcast=True)


@jit
def _counts(b_x, low, step):
    """How many are >= low + step, low + 2 step, low + 3 step: 21 bits each."""
    b_one = (b_x >= low + step).to(tl.int64)
    b_two = (b_x >= low + 2 * step).to(tl.int64) << 21
    b_three = (b_x >= low + 3 * step).to(tl.int64) << 42
    return tl.sum(b_one + b_two + b_three, axis=0)


@jit
def _threshold(b_first, p_x, p_map, n, limit, k, MAPPED: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr):
    """Bits of the k-th largest of ``n`` >= k weights, or of a bound that just k reach; and how many equal are wanted.

    Weights are in 0..1: 30 bits. The first ``BT`` stay in registers.
    """
    low = 0
    reached = n
    step = 1 << 28
    while (step > 0) & (reached != k):
        counts = _counts(b_first, low, step)
        for begin in range(BT, n, BT):
            counts += _counts(_bits(p_x, p_map, begin + tl.arange(0, BT), n, limit, MAPPED, GROUP), low, step)
        one = (counts & 0x1FFFFF).to(tl.int32)
        two = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        three = (counts >> 42).to(tl.int32)
        if three >= k:
            low += 3 * step
            reached = three
        elif two >= k:
            low += 2 * step
            reached = two
        elif one >= k:
            low += step
            reached = one
        step = step >> 2
    wanted = k
    if reached != k:
        wanted -= tl.sum((b_first > low).to(tl.int32), axis=0)
        for begin in range(BT, n, BT):
            b_x = _bits(p_x, p_map, begin + tl.arange(0, BT), n, limit, MAPPED, GROUP)
            wanted -= tl.sum((b_x > low).to(tl.int32), axis=0)
    return low, wanted


@jit
def _compact(
    b_first, p_x, p_map, n, limit, low, wanted, p_out, MAPPED: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr
):
    """Write the places above ``low``, and the first ``wanted`` equal to it, ascending; returns how many."""
    above, equal = 0, 0
    for begin in range(0, n, BT):
        o_x = begin + tl.arange(0, BT)
        b_x = b_first
        if begin > 0:
            b_x = _bits(p_x, p_map, o_x, n, limit, MAPPED, GROUP)
        m_above, m_equal = b_x > low, b_x == low
        b_step = m_above.to(tl.int32) + (m_equal.to(tl.int32) << 16)
        b_upto = tl.cumsum(b_step, axis=0)
        b_above, b_equal = above + (b_upto & 0xFFFF), equal + (b_upto >> 16)
        m_taken = m_above | (m_equal & (b_equal <= wanted))
        if MAPPED:
            o_x = tl.load(p_map + o_x // GROUP, mask=o_x < n, other=0) * GROUP + o_x % GROUP
        tl.store(p_out + b_above + tl.minimum(b_equal, wanted) - 1, o_x, mask=m_taken)
        total = tl.sum(b_step, axis=0)
        above += total & 0xFFFF
        equal += total >> 16
    return above + tl.minimum(equal, wanted)


@jit
def _choose(p_weights, p_maxima, p_groups, p_out, n, k, GROUP: tl.constexpr, BT: tl.constexpr):
    """The ``k`` largest of ``n`` weights of one KV head into ``p_out``, ascending; returns how many there are."""
    n_chosen = n
    if n <= k:
        for begin in range(0, n, BT):
            o_out = begin + tl.arange(0, BT)
            tl.store(p_out + o_out, o_out, mask=o_out < n)
    else:
        n_groups = tl.cdiv(n, GROUP)
        k_groups = tl.minimum(n_groups, k)
        b_first = _bits(p_maxima, p_groups, tl.arange(0, BT), n_groups, n_groups, False, GROUP)
        low, wanted = _threshold(b_first, p_maxima, p_groups, n_groups, n_groups, k_groups, False, GROUP, BT)
        _compact(b_first, p_maxima, p_groups, n_groups, n_groups, low, wanted, p_groups, False, GROUP, BT)
        tl.debug_barrier()
        n_places = k_groups * GROUP
        b_first = _bits(p_weights, p_groups, tl.arange(0, BT), n_places, n, True, GROUP)
        low, wanted = _threshold(b_first, p_weights, p_groups, n_places, n, k, True, GROUP, BT)
        n_chosen = _compact(b_first, p_weights, p_groups, n_places, n, low, wanted, p_out, True, GROUP, BT)
    for begin in range(0, k, BT):
        o_out = begin + tl.arange(0, BT)
        tl.store(p_out + o_out, -1, mask=(o_out >= n_chosen) & (o_out < k))
    return n_chosen


@jit
def log_sum(p_part, i_row, n_rows, m_row, n_splits, BR: tl.constexpr, BS: tl.constexpr):
    """Base-2 log of the softmax's denominator for rows [BR], from the partial maxima and sums of all splits."""
    o_split = tl.arange(0, BS)
    # [BR, BS]
    o_part = i_row[:, None].to(tl.int64) * n_splits + o_split[None, :]
    m_part = m_row[:, None] & (o_split < n_splits)[None, :]
    b_max = tl.load(p_part + o_part, mask=m_part, other=-1e38)
    b_sum = tl.load(p_part + n_rows.to(tl.int64) * n_splits + o_part, mask=m_part, other=0.0)
    # [BR]
    b_top = tl.max(b_max, axis=1)
    b_sum = tl.sum(b_sum * tl.exp2(b_max - b_top[:, None]), axis=1)
    return tl.where(b_sum > 0, b_top, 0.0) + tl.log2(tl.where(b_sum > 0, b_sum, 1.0))


@jit
def weigh_kernel(
    p_source,
    p_part,
    p_chunks,
    p_weights,
    p_maxima,
    p_groups,
    p_counter,
    p_out,
    p_count,
    n_heads,
    n_source,
    n_splits,
    capacity,
    select,
    share,
    SCORES: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid (programs, KV heads). Source rows [N, n_source, capacity]: base-2 scores, or weights to be added up."""
    i_p, i_n = tl.program_id(0), tl.program_id(1)
    n = tl.load(p_chunks + i_n // n_heads)
    p_weights += i_n.to(tl.int64) * capacity
    p_maxima += i_n.to(tl.int64) * (capacity // GROUP)
    o_row = tl.arange(0, BR)
    m_row = o_row < n_source
    i_row = i_n * n_source + o_row
    if SCORES:
        # [BR]
        b_lse = log_sum(p_part, i_row, tl.num_programs(1) * n_source, m_row, n_splits, BR, BS)
    for begin in range(i_p * BT, n, tl.num_programs(0) * BT):
        o_m = begin + tl.arange(0, BT)
        # [BR, BT]
        o_source = i_row[:, None].to(tl.int64) * capacity + o_m[None, :]
        m_source = m_row[:, None] & (o_m < n)[None, :]
        if SCORES:
            b_s = tl.load(p_source + o_source, mask=m_source, other=float("-inf"))
            b_s = tl.where(m_source, tl.exp2(b_s - b_lse[:, None]), 0.0)
        else:
            b_s = tl.load(p_source + o_source, mask=m_source, other=0.0)
        # [BT]
        b_w = tl.where(o_m < n, tl.sum(b_s, axis=0) * share, -1.0)
        tl.store(p_weights + o_m, b_w, mask=o_m < n)
        o_group = begin // GROUP + tl.arange(0, BT // GROUP)
        b_top = tl.max(tl.reshape(b_w, [BT // GROUP, GROUP]), axis=1)
        tl.store(p_maxima + o_group, b_top, mask=o_group * GROUP < n)
    tl.debug_barrier()
    if tl.atomic_add(p_counter + i_n, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        p_groups += i_n * select
        n_chosen = _choose(p_weights, p_maxima, p_groups, p_out + i_n * select, n, select, GROUP, BK)
        tl.store(p_count + i_n, n_chosen)
        tl.store(p_counter + i_n, 0)
