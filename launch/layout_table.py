"""What `plait config layout` prints: who holds what, and what is sent, without any rank."""

import itertools
import math

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table

from ..parallel.axes import AXES, describe_layout
from ..parallel.state_passing import choose_exchange
from ..pretrain.config import Config
from ..pretrain.layout_messages import Message, layer_messages, outer_messages
from ..pretrain.layout_parts import Holding, Parts
from ..pretrain.readable import readable_size
from .whole_tables import plain_table, print_whole

__all__ = ["show_layout"]

WIDTH = 100
"""Of the output where there is no terminal."""

MOST_ROWS, FIRST_ROWS = 32, 8
"""Ranks that are all shown, and how many of more."""


def show_layout(config: Config, *, every_rank: bool) -> None:
    """Print a run's layout.

    Args:
        every_rank: also of a layout with more than `MOST_ROWS` ranks.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    parts = Parts(config)
    console.print(_facts(parts))
    console.print()
    if parts.ranks > 1:
        console.print(_heading(parts))
        console.print(Padding(_messages(parts), (0, 0, 1, 2)))
    print_whole(console, _ranks(parts, every_rank))


def _facts(parts: Parts) -> RenderableType:
    config, mesh = parts.config, parts.mesh
    batch, length = config.train.batch_size, config.data.seq_len
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_row(
        "model", f"{config.model.pattern}, {parts.num_parameters:,} parameters, {config.train.dtype}"
    )
    ranks = f", {parts.ranks:,} ranks" if parts.ranks > 1 else ""
    grid.add_row("layout", f"[bold]{describe_layout(mesh.sizes)}[/]{ranks}")
    grid.add_row("tokens", f"{batch:,} x {length:,} a step, {_tokens_of_a_rank(parts)}")
    letters = set(config.model.layers)
    if mesh.sp.size > 1 and "M" in letters:
        kind = choose_exchange(mesh.state_exchange, mesh.sp.size)
        grid.add_row("states", f"{kind} over sp (parallel.state_exchange = {mesh.state_exchange})")
    if mesh.sp.size > 1 and "*" in letters:
        fold = (
            "trade half of their queries"
            if mesh.fold_queries
            else "keep their queries, and the last works most"
        )
        grid.add_row("attention", f"ranks of sp {fold} (parallel.fold_queries)")
    grid.add_row("parameters", _gathering(parts))
    if "E" in letters and parts.ranks > 1:
        grid.add_row("experts", _experts(parts))
    if parts.units and parts.micro_rows < parts.rows:
        whole = readable_size(sum(unit.gradient for unit in parts.units))
        grid.add_row("gradients", f"not cut until the last micro-batch: {whole}")
    return grid


def _tokens_of_a_rank(parts: Parts) -> str:
    mesh, length = parts.mesh, parts.config.data.seq_len
    most = "at most " if parts.config.train.batch_size % mesh.data_ranks else ""
    count = math.ceil(parts.rows / parts.micro_rows)
    micro = f" in {count:,} micro-batches" if count > 1 else ""
    shard = min(length, mesh.shard_length(length))
    return f"{most}{parts.rows:,} x {shard:,} = {parts.rows * shard:,} a rank{micro}"


def _gathering(parts: Parts) -> str:
    if parts.mesh.size("fsdp") == 1:
        return "each rank holds its own through the step"
    *inner, last = parts.units_over("fsdp")
    layer = max((unit for unit in inner if unit.layer is not None), key=lambda unit: unit.gathered)
    assert layer.layer is not None
    letter = parts.config.model.layers[layer.layer]
    stays = "embedding" if parts.config.model.tie_embeddings else "head"
    return (
        f"cut over {_fsdp_axes(parts)}; gathered while it computes: {readable_size(layer.gathered)} at most "
        f"(layer {layer.layer}, {letter}), and {readable_size(last.gathered)} all the while (the {stays})"
    )


def _experts(parts: Parts) -> str:
    moe, mesh = parts.config.model.moe, parts.mesh
    assert moe is not None
    here = moe.num_experts // mesh.ep.size
    sharers = mesh.size("efsdp")
    held = "all" if mesh.ep.size == 1 else f"{here:,} of {moe.num_experts:,}"
    if sharers == 1:
        return f"{held} on a rank, held whole"
    gathered = max(unit.gathered for unit in parts.units_over("efsdp"))
    return (
        f"{held} on a rank; cut over the {sharers:,} ranks that have the same, and gathered while they "
        f"compute: {readable_size(gathered)} a layer"
    )


def _fsdp_axes(parts: Parts) -> str:
    return " x ".join(a for a in ("dp_shard", "sp") if parts.mesh.sizes[a] > 1)


def _heading(parts: Parts) -> str:
    sequences = "1 sequence" if parts.micro_rows == 1 else f"{parts.micro_rows:,} sequences"
    return f"What a rank sends at most in the forward of a micro-batch of {sequences}:"


def _messages(parts: Parts) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    layers = parts.config.model.layers
    for letter in dict.fromkeys(layers):
        grid.add_row(f"each {letter}", _sentence(layer_messages(parts, letter)))
    grid.add_row("outside", _sentence(outer_messages(parts)))
    if parts.units:
        grid.add_row("parameters", _of_parameters(parts))
    messages = itertools.chain.from_iterable(layer_messages(parts, letter) for letter in set(layers))
    if any(message.even for message in messages):
        grid.add_row("", "[dim](to experts and back: if all are chosen as often)[/]")
    return grid


def _of_parameters(parts: Parts) -> str:
    said = []
    for name, axes in (("fsdp", _fsdp_axes(parts)), ("efsdp", "those with the same experts")):
        if parts.mesh.size(name) > 1 and (units := parts.units_over(name)):
            gathered, reduced = (
                readable_size(sum(getattr(u, which) for u in units))
                for which in ("gather_sent", "reduce_sent")
            )
            said.append(f"{axes}: gather {gathered}, and once a step scatter of the gradients {reduced}")
    if (copies := parts.mesh.sizes["dp_replicate"]) > 1:
        summed = 2 * (copies - 1) * parts.of(0).parameter_bytes // copies
        said.append(f"dp_replicate: once a step sum of the gradients {readable_size(summed)}")
    return "; ".join(said)


def _sentence(messages: list[Message]) -> str:
    """The messages of each axis after its name."""
    by_axis: dict[str, list[str]] = {}
    for message in messages:
        name = {"tokens": "sp x tp"}.get(message.axis, message.axis)
        by_axis.setdefault(name, []).append(f"{message.what} {readable_size(message.sent)}")
    return "; ".join(f"{axis}: {', '.join(said)}" for axis, said in by_axis.items()) or "nothing"


def _ranks(parts: Parts, every_rank: bool) -> RenderableType:
    holders = range(parts.ranks)
    cut = parts.ranks > MOST_ROWS and not every_rank
    shown = [*holders[:FIRST_ROWS], holders[-1]] if cut else [*holders]
    holdings = [parts.of(rank) for rank in shown]
    axes = [axis for axis in AXES if parts.mesh.sizes[axis] > 1]
    tp = parts.mesh.tp.size > 1
    experts = parts.mesh.ep.size > 1
    padded = parts.config.data.seq_len % parts.mesh.size("tokens") != 0
    table = plain_table()
    names = {"dp_replicate": "dp_re-\nplicate", "dp_shard": "dp_\nshard"}
    columns = ["rank", *(names.get(axis, axis) for axis in axes), "sequences", "tokens"]
    columns += ["between\nmixers"] if tp else []
    columns += ["pad"] if padded else []
    columns += ["experts"] if experts else []
    for name in (*columns, "parameters", "AdamW"):
        table.add_column(name, justify="right", no_wrap=True)
    for holding in holdings:
        if cut and holding is holdings[-1]:
            table.add_row("…")
        table.add_row(*_row(holding, axes, tp, padded, experts))
    if not cut:
        return table
    grid = Table.grid()
    grid.add_row(table)
    between = parts.ranks - FIRST_ROWS - 1
    grid.add_row(f"{between:,} ranks between are not shown; --all shows them")
    return grid


def _row(holding: Holding, axes: list[str], tp: bool, padded: bool, experts: bool) -> list[str]:
    return [
        str(holding.rank),
        *(str(holding.places[axis]) for axis in axes),
        _span(holding.sequences),
        _span(holding.tokens),
        *([_span(holding.stream)] if tp else []),
        *([str(holding.padding)] if padded else []),
        *([_span(holding.experts)] if experts else []),
        readable_size(holding.parameter_bytes),
        readable_size(holding.optimizer_bytes),
    ]


def _span(indices: range) -> str:
    """Both ends included."""
    if len(indices) < 2:
        return str(indices.start) if indices else "none"
    return f"{indices.start}..{indices.stop - 1}"
