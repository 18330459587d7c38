"""Bytes that leave a rank for one layer of a sequence cut over R ranks, in closed form.

Shapes: B batch, L tokens of the whole sequence, T = L / R, D model width, I = H P inner width, H heads, P
head dim, G groups, N state size, K taps of the convolution; e bytes of an activation, 4 of a state.
"""

from dataclasses import dataclass

__all__ = [
    "FORMS",
    "STATE_FORMS",
    "AttentionShape",
    "MambaShape",
    "Sent",
    "attention_sent",
    "layer_sent",
    "pairs",
]

STATE_FORMS = ("ring", "gather", "scan")
FORMS = (*STATE_FORMS, "all-to-all", "all-to-all, z at home")
"""How a Mamba-2 layer is computed: with states that travel, or with whole sequences of some heads."""

Sent = dict[str, int]
"""Direction -> bytes."""


@dataclass(frozen=True)
class MambaShape:
    d_model: int
    heads: int
    head_dim: int
    d_state: int
    groups: int
    batch: int = 1
    taps: int = 4
    element: int = 4
    """Bytes of an activation."""

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def state(self) -> int:
        """Bytes of (B, H, P, N) in fp32."""
        return self.batch * self.inner * self.d_state * 4

    @property
    def decay(self) -> int:
        """Bytes of (B, H) in fp32."""
        return self.batch * self.heads * 4

    @property
    def halo(self) -> int:
        """Bytes of (B, K - 1, D)."""
        return self.batch * (self.taps - 1) * self.d_model * self.element


def layer_sent(form: str, shape: MambaShape, length: int, ranks: int, place: int) -> Sent:
    """By the rank at a place of R, in a forward and in a backward.

    Raises:
        ValueError: the ranks do not divide the length; or, for an all-to-all, the heads.
    """
    if length % ranks:
        raise ValueError(f"{ranks} ranks do not divide {length} tokens")
    if form in STATE_FORMS:
        after, before = ranks - 1 - place, place
        return {
            "forward": _state_sent(form, shape, ranks, after) + shape.halo * (after > 0),
            "backward": _state_sent(form, shape, ranks, before) + shape.halo * (before > 0),
        }
    if shape.heads % ranks:
        raise ValueError(f"{ranks} ranks do not divide {shape.heads} heads")
    z_ways = 2 if form == "all-to-all" else 0
    channels = (2 + z_ways) * shape.inner + shape.heads + 2 * max(shape.groups, ranks) * shape.d_state
    sent = shape.batch * (length // ranks) * (ranks - 1) * (channels // ranks) * shape.element
    return {"forward": sent, "backward": sent}


def _state_sent(form: str, shape: MambaShape, ranks: int, downstream: int) -> int:
    """
    Args:
        downstream: ranks that the states go on to from this one.
    """
    if form == "ring":
        return shape.state * (downstream > 0)
    if form == "gather":
        return (ranks - 1) * (shape.state + shape.decay)
    # A message in each round k with 2^k <= downstream.
    return downstream.bit_length() * (shape.state + shape.decay)


@dataclass(frozen=True)
class AttentionShape:
    heads: int
    key_heads: int
    head_dim: int
    batch: int = 1
    element: int = 4


def attention_sent(shape: AttentionShape, length: int, ranks: int, place: int) -> dict[str, Sent]:
    """By the rank at a place: of K and V, and of the fold's queries and outputs."""
    tokens = length // ranks
    key = shape.batch * tokens * shape.key_heads * shape.head_dim * shape.element
    query = shape.batch * (tokens // 2) * shape.heads * shape.head_dim * shape.element
    gathered = (ranks - 1) * 2 * key
    swapped = 0 if place == ranks - 1 - place else 2 * query
    return {
        "gather": {"forward": gathered, "backward": gathered},
        "fold": {"forward": swapped, "backward": swapped},
    }


def pairs(length: int, ranks: int, place: int, *, fold: bool) -> int:
    """Of a query and a key that it sees, on the rank at a place; one document."""
    tokens, partner = length // ranks, ranks - 1 - place
    here = place * tokens
    if not fold or partner == place:
        return _seen(here, tokens)
    early = tokens - tokens // 2
    return _seen(here, early) + _seen(partner * tokens + early, tokens // 2)


def _seen(offset: int, queries: int) -> int:
    return queries * offset + queries * (queries + 1) // 2
