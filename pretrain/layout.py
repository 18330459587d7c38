"""Which layouts a run can have: the rules that the mesh's sizes must keep, and the nearest that keep them."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..parallel.axes import AXES, describe_layout, num_ranks

if TYPE_CHECKING:
    from .model_config import ModelConfig

__all__ = ["check_layout", "layout_faults"]

Sizes = Mapping[str, int]

SHOWN = 3
"""Layouts that an error proposes."""

MOST_RANKS = 1 << 20
"""Of a layout for which others are sought; more are a slip of the hand."""


def check_layout(model: "ModelConfig", sizes: Sizes, *, seq_len: int, batch_size: int) -> None:
    """
    Args:
        sizes: axis -> ranks, `ep` among them.

    Raises:
        ValueError: names the first rule that the layout breaks and the nearest layouts of as many ranks
            that break none.
    """
    fault = next(layout_faults(model, sizes, seq_len=seq_len, batch_size=batch_size), None)
    if fault is None:
        return
    ranks = num_ranks(sizes)
    working = [
        other
        for other in (_layouts(ranks) if ranks <= MOST_RANKS else ())
        if not any(layout_faults(model, other, seq_len=seq_len, batch_size=batch_size))
    ]
    working.sort(key=lambda other: _distance(sizes, other))
    nearest = "; or ".join(describe_layout(other) for other in working[:SHOWN])
    remedy = (
        f"layouts of {ranks} ranks that work: {nearest}"
        if nearest
        else f"no layout of {ranks} ranks works; start fewer"
    )
    raise ValueError(f"{fault}; {remedy}")


def layout_faults(model: "ModelConfig", sizes: Sizes, *, seq_len: int, batch_size: int) -> Iterator[str]:
    """The rules that a layout breaks, a line each."""
    tp, sp, ep = sizes["tp"], sizes["sp"], sizes["ep"]
    letters = set(model.layers)
    for letter, key, whole in (
        ("M", "model.mamba.num_heads", model.mamba and model.mamba.num_heads),
        ("*", "model.attention.num_heads", model.attention and model.attention.num_heads),
        ("-", "model.mlp.d_ff", model.mlp and model.mlp.d_ff),
        ("E", "model.moe.d_shared", model.moe and model.moe.d_shared),
    ):
        if letter in letters and whole and whole % tp:
            yield f"parallel.tp = {tp} does not divide {key} = {whole}"
    for letter, key, count in (
        ("M", "model.mamba.num_groups", model.mamba and model.mamba.num_groups),
        ("*", "model.attention.num_kv_heads", model.attention and model.attention.num_kv_heads),
    ):
        if letter in letters and count and count % tp and tp % count:
            yield f"parallel.tp = {tp} neither divides nor is a multiple of {key} = {count}"
    if -(-model.vocab_size // tp) * (tp - 1) >= model.vocab_size:
        yield f"parallel.tp = {tp} leaves a rank without a row of model.vocab_size = {model.vocab_size}"
    if sp > 1:
        shard = -(-seq_len // (sp * tp)) * tp
        halo = model.mamba.d_conv - 1 if "M" in letters and model.mamba else 1
        if shard < halo:
            yield (
                f"parallel.sp = {sp} cuts data.seq_len = {seq_len} into shards of {shard} tokens, shorter "
                f"than the {halo} that the convolution looks back"
            )
        elif shard * (sp - 1) >= seq_len:
            yield f"parallel.sp = {sp} leaves a rank without a token of data.seq_len = {seq_len}"
    replica = sizes["dp_shard"] * sp * tp
    if replica % ep:
        yield f"parallel.ep = {ep} does not divide dp_shard x sp x tp = {replica}"
    if ep > 1 and (model.moe is None or "E" not in letters):
        yield f"parallel.ep = {ep} but model.pattern = {model.pattern!r} has no experts"
    elif model.moe is not None and model.moe.num_experts % ep:
        yield f"parallel.ep = {ep} does not divide model.moe.num_experts = {model.moe.num_experts}"
    data_ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    if batch_size < data_ranks:
        yield (
            f"parallel.dp_replicate x dp_shard = {data_ranks} leaves a rank without a sequence of "
            f"train.batch_size = {batch_size}"
        )


def _layouts(ranks: int) -> Iterator[dict[str, int]]:
    """All ways to write a number of ranks as a product over the axes, with all that ep can fold out."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for outer in itertools.product(divisors, repeat=len(AXES) - 1):
        if ranks % math.prod(outer) == 0:
            sizes = dict(zip(AXES, (*outer, ranks // math.prod(outer)), strict=True))
            yield from ({**sizes, "ep": ep} for ep in divisors if ranks // sizes["dp_replicate"] % ep == 0)


def _distance(wanted: Sizes, other: Sizes) -> tuple[float, int]:
    """How many doublings away, then as few axes as can be."""
    doublings = sum(abs(math.log2(other[axis] / wanted[axis])) for axis in wanted)
    return doublings, sum(size > 1 for size in other.values())
