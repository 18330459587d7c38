"""The two kernels. A span's K-1 tokens before it are read again, and in the backward those after it too."""

# w0 meets the token itself, w1 the one before it, and so on; x0 … x3 are those tokens.

# What one constant of a kernel defines, the same constant reads.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["convolve", "differentiate"]


@triton.jit
def _inside_if(condition, channels, C):
    """The channels that there are, or none. The interpreter takes no scalar beside a mask."""
    return channels < tl.where(condition, C, 0)


@triton.jit
def _token(x, halo, channels, C, place, x_token, halo_token, K: tl.constexpr, HAS_HALO: tl.constexpr):
    """The input at a place, which may lie before the sequence, in fp32."""
    after = _inside_if(place >= 0, channels, C)
    value = tl.load(x + place * x_token + channels, mask=after, other=0.0).to(tl.float32)
    if HAS_HALO:
        before = _inside_if(place < 0, channels, C)
        at = halo + (place + K - 1) * halo_token + channels
        value += tl.load(at, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _document(ids, place):
    """The document at a place; what lies before the sequence is of document 0."""
    return tl.load(ids + place, mask=place >= 0, other=0)


@triton.jit
def convolve(
    x,
    weight,
    bias,
    halo,
    ids,
    y,
    L,
    C,
    x_row,
    x_token,
    halo_row,
    halo_token,
    weight_channel,
    weight_tap,
    ids_row,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < C
    start = tl.program_id(1).to(tl.int64) * SPAN
    stop = tl.minimum(start + SPAN, L)
    row = tl.program_id(2).to(tl.int64)
    x += row * x_row
    halo += row * halo_row
    ids += row * ids_row
    y += row * L * C + channels

    taps = weight + channels.to(tl.int64) * weight_channel
    w0 = tl.load(taps + (K - 1) * weight_tap, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(taps + (K - 2) * weight_tap, mask=inside, other=0.0).to(tl.float32)
    x1 = _token(x, halo, channels, C, start - 1, x_token, halo_token, K, HAS_HALO)
    if K > 2:
        w2 = tl.load(taps + (K - 3) * weight_tap, mask=inside, other=0.0).to(tl.float32)
        x2 = _token(x, halo, channels, C, start - 2, x_token, halo_token, K, HAS_HALO)
    if K > 3:
        w3 = tl.load(taps + (K - 4) * weight_tap, mask=inside, other=0.0).to(tl.float32)
        x3 = _token(x, halo, channels, C, start - 3, x_token, halo_token, K, HAS_HALO)
    b = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_IDS:
        document = _document(ids, start - 1)
        if K > 2:
            x2 = tl.where(_document(ids, start - 2) == document, x2, 0.0)
        if K > 3:
            x3 = tl.where(_document(ids, start - 3) == document, x3, 0.0)

    for t in tl.range(start, stop, num_stages=STAGES):
        x0 = tl.load(x + t * x_token + channels, mask=inside, other=0.0).to(tl.float32)
        if HAS_IDS:
            now = tl.load(ids + t)
            x1 = tl.where(now == document, x1, 0.0)
            if K > 2:
                x2 = tl.where(now == document, x2, 0.0)
            if K > 3:
                x3 = tl.where(now == document, x3, 0.0)
            document = now
        else:
            # The compiler loads ahead only where nothing is handed on as it is; this changes nothing.
            x1 = tl.where(inside, x1, 0.0)
            if K > 3:
                x2 = tl.where(inside, x2, 0.0)
        u = b + w0 * x0 + w1 * x1
        if K > 2:
            u += w2 * x2
        if K > 3:
            u += w3 * x3
        if SILU:
            u = u * tl.sigmoid(u)
        tl.store(y + t * C, u.to(y.dtype.element_ty), mask=inside)
        if K > 3:
            x3 = x2
        if K > 2:
            x2 = x1
        x1 = x0


@triton.jit
def differentiate(
    dy,
    x,
    weight,
    bias,
    halo,
    ids,
    dx,
    dhalo,
    dtaps,
    L,
    C,
    dy_row,
    dy_token,
    x_row,
    x_token,
    halo_row,
    halo_token,
    weight_channel,
    weight_tap,
    ids_row,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dtaps is (programs along tokens and rows, K + 1, C): the sums of each for the taps, then the bias."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < C
    start = tl.program_id(1).to(tl.int64) * SPAN
    stop = tl.minimum(start + SPAN, L)
    row = tl.program_id(2).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    dy += row * dy_row
    x += row * x_row
    halo += row * halo_row
    ids += row * ids_row
    dx += row * L * C + channels
    dhalo += row * (K - 1) * C + channels
    dtaps += part * (K + 1) * C + channels

    taps = weight + channels.to(tl.int64) * weight_channel
    w0 = tl.load(taps + (K - 1) * weight_tap, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(taps + (K - 2) * weight_tap, mask=inside, other=0.0).to(tl.float32)
    x1 = _token(x, halo, channels, C, start - 1, x_token, halo_token, K, HAS_HALO)
    # g1 is what token t-1 has got of its gradient so far, and so on.
    g1 = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    dw0 = tl.zeros([BLOCK], tl.float32)
    dw1 = tl.zeros([BLOCK], tl.float32)
    if K > 2:
        w2 = tl.load(taps + (K - 3) * weight_tap, mask=inside, other=0.0).to(tl.float32)
        x2 = _token(x, halo, channels, C, start - 2, x_token, halo_token, K, HAS_HALO)
        g2 = tl.zeros([BLOCK], tl.float32)
        dw2 = tl.zeros([BLOCK], tl.float32)
    if K > 3:
        w3 = tl.load(taps + (K - 4) * weight_tap, mask=inside, other=0.0).to(tl.float32)
        x3 = _token(x, halo, channels, C, start - 3, x_token, halo_token, K, HAS_HALO)
        g3 = tl.zeros([BLOCK], tl.float32)
        dw3 = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_IDS:
        document = _document(ids, start - 1)
        # Whether token t-1, t-2 is of the document of the one after it. Those before the span get no
        # gradient here but from the first tokens of the sequence, and there all of it is document 0.
        one = start >= 0
        two = start >= 0
        if K > 2:
            x2 = tl.where(_document(ids, start - 2) == document, x2, 0.0)
        if K > 3:
            x3 = tl.where(_document(ids, start - 3) == document, x3, 0.0)

    for t in tl.range(start, stop + (K - 1), num_stages=STAGES):
        here = _inside_if(t < L, channels, C)
        x0 = tl.load(x + t * x_token + channels, mask=here, other=0.0).to(tl.float32)
        du = tl.load(dy + t * dy_token + channels, mask=here, other=0.0).to(tl.float32)
        if HAS_IDS:
            now = tl.load(ids + t, mask=t < L, other=0)
            same = now == document
            x1 = tl.where(same, x1, 0.0)
            if K > 2:
                x2 = tl.where(same, x2, 0.0)
            if K > 3:
                x3 = tl.where(same, x3, 0.0)
            document = now
        else:
            # As in `convolve`.
            x1 = tl.where(inside, x1, 0.0)
            if K > 3:
                x2 = tl.where(inside, x2, 0.0)
        if SILU:
            u = b + w0 * x0 + w1 * x1
            if K > 2:
                u += w2 * x2
            if K > 3:
                u += w3 * x3
            s = tl.sigmoid(u)
            du = du * s * (1.0 + u * (1.0 - s))
        # The tokens after the span are counted by its neighbour.
        own = tl.where(t < stop, du, 0.0)
        db += own
        dw0 += own * x0
        dw1 += own * x1
        c1 = w1 * du
        if HAS_IDS:
            c1 = tl.where(same, c1, 0.0)
        if K > 2:
            dw2 += own * x2
            c2 = w2 * du
            if HAS_IDS:
                c2 = tl.where(same & one, c2, 0.0)
        if K > 3:
            dw3 += own * x3
            c3 = w3 * du
            if HAS_IDS:
                c3 = tl.where(same & two, c3, 0.0)

        done = g1 + c1
        if K == 3:
            done = g2 + c2
        if K == 4:
            done = g3 + c3
        place = t - (K - 1)
        tl.store(dx + place * C, done.to(dx.dtype.element_ty), mask=_inside_if(place >= start, channels, C))
        if HAS_HALO:
            before = _inside_if((start == 0) & (place < 0), channels, C)
            tl.store(dhalo + t * C, done.to(dhalo.dtype.element_ty), mask=before)

        if K > 3:
            x3 = x2
            g3 = g2 + c2
        if K > 2:
            x2 = x1
            g2 = g1 + c1
        x1 = x0
        g1 = w0 * du
        if HAS_IDS:
            two = same & one
            one = same

    tl.store(dtaps + (K - 1) * C, dw0, mask=inside)
    tl.store(dtaps + (K - 2) * C, dw1, mask=inside)
    if K > 2:
        tl.store(dtaps + (K - 3) * C, dw2, mask=inside)
    if K > 3:
        tl.store(dtaps + (K - 4) * C, dw3, mask=inside)
    tl.store(dtaps + K * C, db, mask=inside)
