"""Metrics that have a number for each layer of a letter of the pattern."""

from .config import ModelConfig

__all__ = ["layers_of"]

LETTERS = {"max_violation": "E", "dead_experts": "E", "router_entropy": "E", "state_norm": "M"}
"""Metric -> the letter of the layers that have it."""


def layers_of(metric: str, config: ModelConfig) -> list[int]:
    """The layers, from 0, that a metric's numbers are of, in their order."""
    return [index for index, letter in enumerate(config.layers) if letter == LETTERS[metric]]
