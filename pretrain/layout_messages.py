"""What a layout's ranks send each other, by the formulas: the ledger of a step agrees to the byte.

All are of one micro-batch's forward, in bytes that leave the rank that sends most. Its backward sends
each the other way.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..parallel.state_passing import choose_exchange
from .layout_parts import Parts

__all__ = ["Message", "layer_messages", "outer_messages"]


COUNT = 8
"""Bytes of a number of rows."""


@dataclass(frozen=True)
class Message:
    axis: str
    kind: str
    """As in the ledger."""
    what: str
    """As a person would say it."""
    sent: int
    even: bool = False
    """Whether the bytes are those of experts that all get as many tokens."""


def layer_messages(parts: Parts, letter: str) -> list[Message]:
    """What a layer of a letter sends."""
    makers = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}
    return [message for message in makers[letter](parts) if message.sent]


def outer_messages(parts: Parts) -> list[Message]:
    """What the embedding and the loss send, were every token a target."""
    tp = parts.mesh.tp.size
    stream = _stream(parts)
    numbers = 2 * parts.micro_rows * _shard(parts) * _exact(parts)
    messages = (
        Message("tp", "reduce_scatter", "scatter of the embedding's rows", (tp - 1) * stream),
        Message("tp", "all_gather", "gather of the stream before the head", (tp - 1) * stream),
        Message("tp", "all_gather", "two numbers a target for the loss", (tp - 1) * numbers),
    )
    return [message for message in messages if message.sent]


def _mamba(parts: Parts) -> Iterator[Message]:
    config, mesh = parts.config.model.mamba, parts.mesh
    assert config is not None
    tp, sp, rows = mesh.tp.size, mesh.sp.size, parts.micro_rows
    yield from _in_and_out(parts)
    if tp > config.num_groups:
        squares = rows * _shard(parts) * config.num_groups * _exact(parts)
        yield Message(
            "tp", "all_reduce", "sum of the norm's squares in a shared group", 2 * (tp - 1) * squares // tp
        )
    if sp == 1:
        return
    halo = rows * (config.d_conv - 1) * parts.config.model.d_model * parts.compute_dtype.itemsize
    yield Message("sp", "halo", "halo", halo)
    heads = config.num_heads // tp
    state = rows * heads * config.head_dim * config.d_state * _exact(parts)
    packed = state + rows * heads * _exact(parts)
    kind = choose_exchange(mesh.state_exchange, sp)
    volume = {
        "ring": state,
        "gather": (sp - 1) * packed,
        "scan": math.ceil(math.log2(sp)) * packed,
    }[kind]
    yield Message("sp", f"state_{kind}", f"state by {kind}", volume)


def _attention(parts: Parts) -> Iterator[Message]:
    config, mesh = parts.config.model.attention, parts.mesh
    assert config is not None
    tp, sp, rows, length = mesh.tp.size, mesh.sp.size, parts.micro_rows, _shard(parts)
    yield from _in_and_out(parts)
    head = rows * config.head_dim * parts.compute_dtype.itemsize
    keys = 2 * max(1, config.num_kv_heads // tp) * length * head
    yield Message("sp", "all_gather", "gather of keys and values", (sp - 1) * keys)
    if sp > 1 and mesh.fold_queries:
        traded = config.num_heads // tp * (length // 2) * head
        yield Message("sp", "swap", "trade of half the queries and their outputs", 2 * traded)


def _mlp(parts: Parts) -> Iterator[Message]:
    yield from _in_and_out(parts)


def _moe(parts: Parts) -> Iterator[Message]:
    config, mesh = parts.config.model.moe, parts.mesh
    assert config is not None
    if config.aux_loss:
        ranks = mesh.size("tokens")
        counts = parts.micro_rows * config.num_experts * _exact(parts)
        yield Message(
            "tokens", "all_reduce", "sum of the sequences' choices", 2 * (ranks - 1) * counts // ranks
        )
    ranks = mesh.ep.size
    rows = parts.micro_rows * _shard(parts) // mesh.tp.size * config.top_k
    width = (config.latent_dim or parts.config.model.d_model) * parts.compute_dtype.itemsize
    yield Message("ep", "expert_counts", "numbers of rows", (ranks - 1) * config.num_experts // ranks * COUNT)
    share = rows * (ranks - 1) // ranks * width
    yield Message("ep", "dispatch", "tokens to their experts", share, even=True)
    yield Message("ep", "combine", "their outputs back", share, even=True)
    if config.d_shared:
        yield from _in_and_out(parts, " for the shared expert")


def _in_and_out(parts: Parts, of: str = "") -> Iterator[Message]:
    volume = (parts.mesh.tp.size - 1) * _stream(parts)
    yield Message("tp", "all_gather", f"gather{of}", volume)
    yield Message("tp", "reduce_scatter", f"scatter{of}", volume)


def _shard(parts: Parts) -> int:
    """Tokens of a sequence within a mixer, padding included."""
    return parts.mesh.shard_length(parts.config.data.seq_len)


def _stream(parts: Parts) -> int:
    """Bytes of a micro-batch's residual stream on a rank."""
    tokens = parts.micro_rows * _shard(parts) // parts.mesh.tp.size
    return tokens * parts.config.model.d_model * parts.compute_dtype.itemsize


def _exact(parts: Parts) -> int:
    """Bytes of a number that is at least fp32."""
    return torch.promote_types(parts.compute_dtype, torch.float32).itemsize
