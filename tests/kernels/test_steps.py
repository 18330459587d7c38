"""One token at a time against whole sequences: the recurrences that generation runs on."""

import math
from typing import Any

import pytest
import torch

from plait.kernels.attention import attention_step, causal_attention_naive
from plait.kernels.convolution import causal_convolution, convolution_step
from plait.kernels.ssd import ssd, ssd_naive, ssd_step

BATCH, HEADS, HEAD_DIM, STATE = 2, 4, 3, 5
F64 = torch.float64


def scan_inputs(length, groups, dtype=F64):
    x = torch.randn(BATCH, length, HEADS, HEAD_DIM, dtype=F64).to(dtype)
    dt = torch.randn(BATCH, length, HEADS, dtype=F64).to(torch.promote_types(dtype, torch.float32))
    B, C = (torch.randn(BATCH, length, groups, STATE, dtype=F64).to(dtype) for _ in range(2))
    A, D, bias = (torch.randn(HEADS, dtype=dt.dtype) for _ in range(3))
    options: dict[str, Any] = {"D_H": D, "dt_bias_H": bias}
    return x, dt, -A.exp(), B, C, options


def scan_by_steps(state, x, dt, A, B, C, options):
    outputs = [ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], **options) for t in range(x.shape[1])]
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.5)])
def test_steps_are_the_naive_scan(groups, limit):
    x, dt, A, B, C, options = scan_inputs(9, groups)
    options["dt_limit"] = limit
    y, state = ssd_naive(x, dt, A, B, C, **options)
    zero = torch.zeros_like(state)
    got, reached = scan_by_steps(zero, x, dt, A, B, C, options)
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reached, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 130])
def test_steps_go_on_from_the_chunked_scan(prompt):
    """A prompt of two documents through the chunked form, then steps: the recurrence over all of it."""
    length = prompt + 6
    x, dt, A, B, C, options = scan_inputs(length, 2)
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    ids[1, prompt // 2 :] += 1
    expected, last = ssd_naive(x, dt, A, B, C, document_ids_BL=ids, **options)
    first, rest = slice(prompt), slice(prompt, None)
    options |= {"document_ids_BL": ids[:, first], "chunk_size": 16}
    _, state = ssd(x[:, first], dt[:, first], A, B[:, first], C[:, first], **options)
    del options["document_ids_BL"], options["chunk_size"]
    got, reached = scan_by_steps(state, x[:, rest], dt[:, rest], A, B[:, rest], C[:, rest], options)
    torch.testing.assert_close(got, expected[:, prompt:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reached, last, rtol=1e-10, atol=1e-10)


def test_a_state_stays_fp32_under_bf16():
    x, dt, A, B, C, options = scan_inputs(40, 2, torch.bfloat16)
    wide = [t.double() for t in (x, dt, A, B, C)]
    expected, last = ssd_naive(*wide, **{name: t.double() for name, t in options.items()})
    state = torch.zeros(BATCH, HEADS, HEAD_DIM, STATE)
    got, _ = scan_by_steps(state, x, dt, A, B, C, options)
    assert got.dtype == torch.bfloat16
    # The inputs are exact in both, so fp32 rounding is all that the states may show.
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [True, False])
def test_steps_are_the_convolution(taps, activation, biased):
    x, tail = torch.randn(BATCH, 9, 5, dtype=F64), torch.randn(BATCH, taps - 1, 5, dtype=F64)
    weight, bias = torch.randn(5, taps, dtype=F64), torch.randn(5, dtype=F64) if biased else None
    expected = causal_convolution(x, weight, bias, halo_BKC=tail, activation=activation)
    moving = tail.clone()
    outputs = [convolution_step(x[:, t], moving, weight, bias, activation=activation) for t in range(9)]
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(moving, torch.cat([tail, x], 1)[:, 1 - taps :])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_step_is_the_last_row_of_attention(key_heads):
    length = 11
    q = torch.randn(BATCH, length, HEADS, 8, dtype=F64)
    k, v = (torch.randn(BATCH, length, key_heads, 8, dtype=F64) for _ in range(2))
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    ids[1, 4:] += 1
    for documents in (None, ids):
        expected = causal_attention_naive(q, k, v, document_ids_BS=documents)[:, -1]
        mask = documents == documents[:, -1:] if documents is not None else None
        got = attention_step(q[:, -1], k.transpose(1, 2), v.transpose(1, 2), mask)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
