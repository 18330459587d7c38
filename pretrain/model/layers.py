"""The small modules that every mixer is made of, and what a mixer is.

Shapes: B batch, L length, D model width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...kernels.normalization import add_rms_norm, rms_norm
from ...kernels.products import linear
from ...parallel.experts import Dispatch
from ...parallel.mesh import Mesh
from ...parallel.placements import local
from ...parallel.state_passing import StateExchange
from ...parallel.travel import Arrival
from .parameters import Constant, Rule, declare

__all__ = [
    "Cache",
    "Cut",
    "Kept",
    "Linear",
    "Mixer",
    "Packing",
    "RMSNorm",
    "Report",
    "WeightOf",
    "exact",
    "shared_rows",
]


@dataclass(frozen=True)
class Packing:
    """How documents lie in the sequences of a batch, and what of the batch is real.

    Rows and lengths that the ranks do not divide are padded at the end. Padding has no targets and
    comes after everything that it could disturb; what counts tokens or keeps states leaves it out.
    """

    positions_BL: Tensor
    """Each token's place in its document, from 0."""
    document_ids_BL: Tensor | None
    """Of this shard's tokens, non-decreasing: 0 goes on with the previous shard's last document, the
    next is 1; None where documents are not isolated."""
    whole_ids_BS: Tensor | None = None
    """Of the whole sequence's tokens, where it is cut over ranks and documents are isolated."""
    cut: "Cut | None" = None
    """None where nothing is padded and the sequence is not cut."""
    most: tuple[int, int] = (0, 0)
    """Documents of a row and tokens of a document, at most; 0 where it is not known. A GPU's attention would
    have to ask the device."""

    @property
    def last_document_BL(self) -> Tensor | None:
        """True at the tokens of each row's last document; None where a row is one."""
        ids = self.document_ids_BL
        return ids == ids[:, -1:] if ids is not None else None

    @property
    def key_ids_BS(self) -> Tensor | None:
        """Document ids of all tokens that a sequence's queries may meet."""
        return self.document_ids_BL if self.whole_ids_BS is None else self.whole_ids_BS


@dataclass(frozen=True)
class Cut:
    """What of a rank's batch is real, and of how much it is a part."""

    rows: int
    """Real sequences; the rows after them are padding."""
    tokens: int
    """Real tokens of this shard, before tensor parallelism cuts it; those after them are padding."""
    length: int
    """Real tokens of the whole sequence."""


@dataclass
class Report:
    """What a mixer gives beside its output, without side effects, so that it may be computed twice."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """Differentiable scalars to be added to the training loss, already weighted: sums, not means."""
    counts_E: Tensor | None = None
    """This rank's tokens that each expert got, if the mixer has experts."""
    router_entropy: Tensor | None = None
    """Sum over this rank's tokens of the entropy of the router's scores, in nats, if the mixer has one;
    None without gradients: generation would pay for what nobody reads."""
    state_square: Tensor | None = None
    """Sum of squares of this rank's SSM states after the sequences' last tokens, if the mixer has them."""


class Kept:
    """What a layer heard from other ranks in a forward, for the same layer computed again."""

    def __init__(self, mesh: Mesh) -> None:
        self.exchange = StateExchange(mesh) if mesh.sp.size > 1 else None
        self.halo = Arrival()
        self.choice_BLK: Tensor | None = None
        """Each token's experts: rounding must not change them under what was sent already."""
        self.chosen_BE: Tensor | None = None
        """How often each sequence chose each expert, over all ranks."""
        self.dispatch: Dispatch | None = None


class Cache:
    """What a mixer keeps of the tokens so far, to go on by one; the mixer itself remembers nothing."""


class Mixer(nn.Module):
    """What a layer of the pattern computes from its normalised input.

    `forward` is training's. `prefill` and `step` are generation's, on one rank and without gradients;
    a mixer whose tokens do not see each other has them from here.
    """

    mesh: Mesh

    def forward(self, x_BLD: Tensor, packing: Packing, kept: Kept) -> tuple[Tensor, Report]:
        """The output, cut along the sequence as x is: over sp and, inside it, over tp."""
        raise TypeError(f"{type(self).__name__} is a mixer without a forward")

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, Cache | None]:
        """The output of `forward`, and what `step` needs to continue each row's last document.

        Args:
            capacity: tokens that a row will hold at most, those of x included.
        """
        return self(x_BLD, packing, Kept(self.mesh))[0], None

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: Cache | None) -> Tensor:
        """The output for each row's next token, (B, 1, D); the cache moves on in place."""
        return self(x_B1D, Packing(positions_B1, None), Kept(self.mesh))[0]


class Linear(nn.Module):
    """``x W^T`` without bias, in x's dtype; the weight is (out, in), kept in the model's dtype."""

    def __init__(self, d_in: int, d_out: int, rule: Rule, *, tp_dim: int | None = None) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (d_out, d_in), rule, tp_dim=tp_dim)

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """
        Args:
            rows: of this rank's part of the weight, for outputs that are not all wanted here.
        """
        weight = local(self.weight)
        return linear(x, (weight if rows is None else weight[rows]).to(x.dtype))


class RMSNorm(nn.Module):
    """Over the last dim; the weight multiplies in at least fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (width,), Constant(1.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, local(self.weight), self.eps)

    def after(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x + y``, or x alone, and its norm."""
        if y is None:
            return x, self(x)
        return add_rms_norm(x, y, local(self.weight), self.eps)


class WeightOf(nn.Module):
    """A weight, and perhaps a bias, for a kernel that is called elsewhere."""

    def __init__(
        self, shape: tuple[int, ...], rule: Rule, *, bias: Rule | None = None, tp_dim: int | None = None
    ) -> None:
        super().__init__()
        self.weight = declare(self, "weight", shape, rule, tp_dim=tp_dim)
        self.bias = declare(self, "bias", shape[:1], bias, tp_dim=tp_dim) if bias is not None else None


def exact(tensor: Tensor) -> Tensor:
    """The tensor in at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def shared_rows(mesh: Mesh, sharers: int, width: int) -> slice | None:
    """The rows of a projection that this rank uses; None for all that it holds.

    Args:
        sharers: neighbours on tp that use the same rows; if several, each holds the whole projection.
        width: rows that they share.
    """
    if sharers == 1:
        return None
    first = mesh.tp.place // sharers * width
    return slice(first, first + width)
