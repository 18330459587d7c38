"""Every operator on small drawn inputs, beside its specification: what correctness and determinism run.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, C channels, K taps or experts a token,
T tokens, D width, E experts, F hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plait.kernels import activation, attention, convolution, cross_entropy, experts, normalization, ssd
from plait.kernels.activation import naive as activation_naive
from plait.kernels.attention.naive import causal_attention_naive
from plait.kernels.convolution import naive as convolution_naive
from plait.kernels.cross_entropy import naive as cross_entropy_naive
from plait.kernels.normalization import naive as normalization_naive

__all__ = ["Case", "cases"]


@dataclass(frozen=True)
class Case:
    name: str
    inputs: dict[str, Tensor]
    """Those that have gradients, in float64."""
    low: tuple[str, ...]
    """Those that take the dtype that is tested; the others are fp32."""
    run: Callable[..., tuple[Tensor, ...]]
    naive: Callable[..., tuple[Tensor, ...]]


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(device)

    def ids(batch: int, length: int) -> Tensor:
        starts = torch.rand(batch, length, generator=generator) < 4 / length
        return starts.cumsum(1).to(torch.int32).to(device)

    yield from _scans(draw, ids, tiny)
    yield from _before_and_after(draw, ids, tiny)
    yield from _mixtures(draw, generator, tiny)
    B, L, H, K, d = (1, 40, 2, 1, 16) if tiny else (2, 300, 8, 2, 64)
    for documents in (None, ids(B, L)):
        kwargs = {"document_ids_BS": documents}
        yield Case(
            f"attention{', documents' if documents is not None else ''}",
            {"q": draw(B, L, H, d), "k": draw(B, L, K, d), "v": draw(B, L, K, d)},
            ("q", "k", "v"),
            lambda q, k, v, kwargs=kwargs: (attention.causal_attention(q, k, v, **kwargs),),
            lambda q, k, v, kwargs=kwargs: (causal_attention_naive(q, k, v, **kwargs),),
        )


def _scans(draw, ids, tiny: bool) -> Iterator[Case]:
    shapes = (
        ((1, 40, 2, 16, 1, 16, 16),)
        if tiny
        else (
            (2, 250, 8, 64, 2, 128, 64),
            (1, 600, 4, 32, 1, 64, 256),
            (1, 63, 4, 128, 4, 256, 128),
        )
    )
    for B, L, H, P, G, N, Q in shapes:
        for documents in (None, ids(B, L)):
            inputs = {
                "x": draw(B, L, H, P),
                "dt": draw(B, L, H) - 2,
                "A": -torch.exp(draw(H)),
                "B": draw(B, L, G, N) / 4,
                "C": draw(B, L, G, N) / 4,
                "D": draw(H),
                "bias": draw(H) / 2,
                "initial": draw(B, H, P, N),
            }
            name = f"ssd, L {L}, P {P}, N {N}, Q {Q}{', documents' if documents is not None else ''}"
            low = ("x", "B", "C")
            fast = partial(_ssd, ssd.ssd, documents, chunk_size=Q)
            yield Case(name, inputs, low, fast, partial(_ssd, ssd.ssd_naive, documents))


def _ssd(form, documents, x, dt, A, B, C, D, bias, initial, **more):
    return form(
        x, dt, A, B, C, D_H=D, dt_bias_H=bias, initial_state_BHPN=initial, document_ids_BL=documents, **more
    )


def _before_and_after(draw, ids, tiny: bool) -> Iterator[Case]:
    B, L, C = (1, 30, 24) if tiny else (2, 515, 1160)
    for documents in (None, ids(B, L)):
        inputs = {"x": draw(B, L, C), "weight": draw(C, 4), "bias": draw(C), "halo": draw(B, 3, C)}
        call = partial(_convolution, documents)
        yield Case(
            f"convolution{', documents' if documents is not None else ''}",
            inputs,
            tuple(inputs),
            partial(call, convolution.causal_convolution),
            partial(call, convolution_naive.causal_convolution),
        )
    T, D, groups = (20, 32, 2) if tiny else (777, 4096, 8)
    inputs = {"x": draw(T, D), "weight": draw(D)}
    yield Case(
        "rms_norm",
        inputs,
        ("x",),
        lambda x, weight: (normalization.rms_norm(x, weight, 1e-5),),
        lambda x, weight: (normalization_naive.rms_norm(x, weight, 1e-5),),
    )
    inputs = {"x": draw(T, D), "y": draw(T, D), "weight": draw(D)}
    yield Case(
        "add_rms_norm",
        inputs,
        ("x", "y"),
        lambda x, y, weight: normalization.add_rms_norm(x, y, weight, 1e-5),
        # The norm is of the sum as it is rounded: in bf16 the difference is within the limit.
        lambda x, y, weight: (x + y, normalization_naive.rms_norm(x + y, weight, 1e-5)),
    )
    inputs = {"x": draw(T, D), "z": draw(T, D), "weight": draw(D)}
    yield Case(
        "gated_rms_norm",
        inputs,
        ("x", "z"),
        lambda x, z, weight: (normalization.gated_rms_norm(x, z, weight, 1e-5, groups),),
        lambda x, z, weight: (normalization_naive.gated_rms_norm(x, z, weight, 1e-5, groups),),
    )
    yield Case(
        "gated_rms_norm, a group that ranks share",
        inputs,
        ("x", "z"),
        lambda x, z, weight: (
            normalization.gated_rms_norm_split(x, z, weight, 1e-5, width=D, sum_over_ranks=lambda sums: sums),
        ),
        lambda x, z, weight: (normalization_naive.gated_rms_norm(x, z, weight, 1e-5, 1),),
    )
    x = {"x": draw(T, D)}
    yield Case(
        "squared_relu",
        x,
        ("x",),
        lambda x: (activation.squared_relu(x),),
        lambda x: (activation_naive.squared_relu(x),),
    )
    two = {"gate": draw(T, D), "up": draw(T, D)}
    yield Case(
        "swiglu",
        two,
        ("gate", "up"),
        lambda gate, up: (activation.swiglu(gate, up),),
        lambda gate, up: (activation_naive.swiglu(gate, up),),
    )


def _convolution(documents, form, x, weight, bias, halo):
    return (form(x, weight, bias, halo_BKC=halo, document_ids_BL=documents, activation="silu"),)


def _mixtures(draw, generator: torch.Generator, tiny: bool) -> Iterator[Case]:
    T, D, E, K, F, V = (16, 16, 4, 2, 16, 40) if tiny else (200, 256, 8, 3, 192, 5000)
    inputs = {
        "x": draw(T, D),
        "weight": draw(T, K),
        "up": draw(E, F, D) / D**0.5,
        "down": draw(E, D, F) / F**0.5,
    }
    device = inputs["x"].device
    score = torch.rand(T, E, generator=generator).to(device)
    expert = experts.choose_experts(score, torch.zeros(E, device=device), top_k=K)

    def routed(x, weight, up, down):
        routing = experts.sort_by_expert(expert, E)
        hidden = experts.grouped_linear(experts.dispatch(x, routing), up, routing.counts_E)
        rows = experts.grouped_linear(activation.squared_relu(hidden), down, routing.counts_E)
        return (experts.combine(rows, weight, routing),)

    def specified(x, weight, up, down):
        expert = experts.choose_experts_naive(score, torch.zeros_like(score[0]), K, 1, 1).to(device)
        return (experts.experts_naive(x, expert, weight, up, down, activation_naive.squared_relu),)

    yield Case("experts", inputs, ("x", "up", "down"), routed, specified)
    targets = torch.randint(V, (T,), generator=generator)
    targets[::5] = -100
    targets = targets.to(device)
    yield Case(
        "cross_entropy",
        {"hidden": draw(T, D), "head": draw(V, D) / D**0.5},
        ("hidden", "head"),
        lambda hidden, head: cross_entropy.linear_cross_entropy(hidden, head, targets, z_loss=1e-3)[:1],
        lambda hidden, head: cross_entropy_naive.linear_cross_entropy(hidden, head, targets, z_loss=1e-3)[:1],
    )
