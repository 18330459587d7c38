"""The layout that a run takes where fewer ranks are to be had than its own needs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from ..parallel.axes import LAYOUT, describe_layout, num_ranks
from .config_section import Count, Section

if TYPE_CHECKING:
    from .config import Config

__all__ = ["FallbackLayout", "Start", "config_for", "start_on", "with_layout"]


class FallbackLayout(Section):
    """Sizes of the axes, 1 where they are not given, and what fewer ranks need to hold as much."""

    dp_replicate: Count = 1
    dp_shard: Count = 1
    sp: Count = 1
    tp: Count = 1
    ep: Count = 1
    micro_batch_size: Count | None = None
    """In the place of ``train.micro_batch_size``; null leaves that."""
    activation_checkpointing: bool | None = None
    """In the place of ``train.activation_checkpointing``; null leaves that."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> ranks, `ep` among them."""
        return {axis: getattr(self, axis) for axis in LAYOUT}

    @property
    def ranks(self) -> int:
        return num_ranks(self.sizes)


@dataclass(frozen=True)
class Start:
    """How many machines a run is started on, with how many ranks each, and in what layout."""

    nodes: int
    ranks_a_node: int
    fallback: FallbackLayout | None
    """None is the config's own layout."""


def config_for(config: "Config", ranks: int) -> "Config":
    """The config as it holds on so many ranks: itself where they are those of its layout, else with the
    first of `launch.fallback_layouts` that has as many. Without any, it stays itself.

    Raises:
        UserError: none has.
    """
    if ranks == config.parallel.ranks or not config.launch.fallback_layouts:
        return config
    for layout in config.launch.fallback_layouts:
        if layout.ranks == ranks:
            return with_layout(config, layout)
    raise UserError(
        f"{ranks} rank{'s were' if ranks > 1 else ' was'} started, but parallel asks for "
        f"{config.parallel.ranks} ({describe_layout(config.parallel.sizes)}) and {_fallbacks(config)}"
    )


def start_on(config: "Config", nodes: int, gpus_per_node: int) -> Start:
    """The first layout, the config's own before the others, that so many machines hold.

    It takes as few of them as it needs, and as many ranks on each.

    Raises:
        UserError: they hold none.
    """
    for layout in (None, *config.launch.fallback_layouts):
        ranks = config.parallel.ranks if layout is None else layout.ranks
        for count in range(-(-ranks // gpus_per_node), nodes + 1):
            if ranks % count == 0:
                return Start(nodes=count, ranks_a_node=ranks // count, fallback=layout)
    raise UserError(
        f"{nodes} node{'s' if nodes > 1 else ''} of {gpus_per_node} {'do' if nodes > 1 else 'does'} not hold "
        f"the {config.parallel.ranks} ranks of parallel ({describe_layout(config.parallel.sizes)}), and "
        f"{_fallbacks(config)}"
    )


def with_layout(config: "Config", layout: FallbackLayout) -> "Config":
    """The config with a fallback layout in the place of its own."""
    tree = config.model_dump(mode="json", by_alias=True)
    tree["parallel"] |= layout.sizes
    for key in ("micro_batch_size", "activation_checkpointing"):
        if (value := getattr(layout, key)) is not None:
            tree["train"][key] = value
    # What is left to fall back on is the business of the config that was given.
    tree["launch"]["fallback_layouts"] = ()
    return type(config).model_validate(tree)


def _fallbacks(config: "Config") -> str:
    layouts = config.launch.fallback_layouts
    if not layouts:
        return "launch.fallback_layouts names no other; start as many, or name a layout for fewer"
    listed = "; ".join(f"{one.ranks} ({describe_layout(one.sizes)})" for one in layouts)
    return f"launch.fallback_layouts for {listed}; start as many as one of these has, or add another"
