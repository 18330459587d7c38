"""The mixture-of-experts mixer, ``E``: a router in fp32, dropless routed experts, a shared one.

Shapes: B batch, L length, D model width, T = B L tokens, E experts, K experts a token, F hidden
width, W the width that routed experts work in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.activation import squared_relu, swiglu
from ...kernels.experts import choose_experts, combine, grouped_linear
from ...parallel.collectives import sum_in_place
from ...parallel.experts import Dispatch
from ...parallel.mesh import Mesh
from ...parallel.placements import local
from ..config import MoEConfig
from .layers import Kept, Linear, Mixer, Packing, Report, exact
from .mlp import MLP
from .parameters import Normal, declare

__all__ = ["MoE", "Router"]


@dataclass(frozen=True)
class Choice:
    expert_TK: Tensor
    weight_TK: Tensor
    losses: dict[str, Tensor]
    entropy: Tensor | None
    """See `Report`."""


class Router(nn.Module):
    """Chooses K experts for each token, all of it in at least fp32."""

    correction_bias: Tensor
    """(E,): takes part in the choice of experts only."""
    counts: Tensor
    """(E,): tokens that each expert got in the last step, over all ranks."""

    def __init__(self, d_model: int, config: MoEConfig, std: float, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        self.weight = declare(self, "weight", (config.num_experts, d_model), Normal(std))
        # Moved by the balance, not by the gradient: part of the state, not a parameter.
        self.register_buffer("correction_bias", torch.zeros(config.num_experts))
        self.register_buffer("counts", torch.zeros(config.num_experts), persistent=False)

    def forward(self, x_BLD: Tensor, length: int, kept: Kept) -> Choice:
        """Choose by score plus bias, weigh by score alone.

        Args:
            x_BLD: this rank's tokens, none of them padding.
            length: tokens of a sequence over all ranks.
        """
        config = self.config
        logits = F.linear(exact(x_BLD), exact(local(self.weight)))
        scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
        entropy = None
        if kept.choice_BLK is None:
            choice = choose_experts(
                scores.detach().flatten(0, 1),
                self.correction_bias,
                top_k=config.top_k,
                num_groups=config.num_groups,
                top_k_groups=config.top_k_groups,
            )
            kept.choice_BLK = choice.unflatten(0, scores.shape[:2])
            entropy = _entropy(scores.detach()) if torch.is_grad_enabled() else None
        expert = kept.choice_BLK
        weight = scores.gather(-1, expert)
        if config.norm_top_k:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        losses = {}
        if config.aux_loss:
            losses["aux_loss"] = config.aux_loss * self._balance_loss(scores, expert, length, kept)
        if config.z_loss:
            losses["router_z_loss"] = config.z_loss * logits.logsumexp(-1).square().sum()
        weight = (weight * config.scaling).flatten(0, 1)
        return Choice(expert.flatten(0, 1), weight, losses, entropy)

    def _balance_loss(self, scores_BLE: Tensor, expert_BLK: Tensor, length: int, kept: Kept) -> Tensor:
        """``sum over sequences of sum_e f_e p_e``, 1 a sequence when balanced; this rank's share of it.

        f_e is the share of the sequence's choices that fell on expert e, times E; p_e its mean share
        of the scores (arXiv 2412.19437, section 2.1.2). f takes the choices of all ranks; p is a sum
        over tokens, and each rank adds its own.
        """
        experts = scores_BLE.shape[-1]
        if kept.chosen_BE is None:
            chosen = F.one_hot(expert_BLK, experts).sum((1, 2)).to(scores_BLE.dtype)
            kept.chosen_BE = sum_in_place(chosen, self.mesh.axes["tokens"])
        fraction = kept.chosen_BE * (experts / (length * self.config.top_k))
        share = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).sum(1) / length
        return (fraction * share).sum()

    @torch.no_grad()
    def balance(self, counts_E: Tensor) -> None:
        """Move the bias a step towards the experts that got less than their share (arXiv 2408.15664).

        Args:
            counts_E: tokens that each expert got in the whole step, over all ranks.
        """
        self.counts.copy_(counts_E)
        if self.config.score_bias:
            lack = self.counts.mean() - self.counts
            self.correction_bias += self.config.score_bias_rate * torch.sign(lack)

    @property
    def max_violation(self) -> float:
        """How far the fullest expert was above the mean: 0 is even, 1 twice the mean (arXiv 2408.15664)."""
        mean = self.counts.mean()
        return float((self.counts.max() - mean) / mean)

    @property
    def dead_experts(self) -> int:
        """Experts that got no token of the whole last step."""
        return int((self.counts == 0).sum())


def _entropy(scores_BLE: Tensor) -> Tensor:
    """Sum over tokens of the entropy, in nats, of their scores as shares of one."""
    share = scores_BLE / (scores_BLE.sum(-1, keepdim=True) + 1e-20)
    # A share of 0 adds 0. `special.entr`, which says so by itself, takes twice the time on the CPU.
    return -(share + 1e-20).log_().mul_(share).sum()


class Experts(nn.Module):
    """Routed experts, of which each rank of ep has some; their matrices are (E, out, in)."""

    def __init__(self, width: int, config: MoEConfig, std: float, out_std: float) -> None:
        super().__init__()
        shape = (config.num_experts, config.d_expert, width)
        self.up_proj = declare(self, "up_proj", shape, Normal(std), ep_dim=0)
        self.gate_proj = (
            declare(self, "gate_proj", shape, Normal(std), ep_dim=0)
            if config.activation == "swiglu"
            else None
        )
        shape = (config.num_experts, width, config.d_expert)
        self.down_proj = declare(self, "down_proj", shape, Normal(out_std), ep_dim=0)

    def forward(self, x_SW: Tensor, counts_E: Tensor) -> Tensor:
        """
        Args:
            x_SW: rows, sorted by expert.
            counts_E: rows of each expert of this rank.
        """
        up = grouped_linear(x_SW, local(self.up_proj).to(x_SW.dtype), counts_E)
        if self.gate_proj is None:
            hidden = squared_relu(up)
        else:
            hidden = swiglu(grouped_linear(x_SW, local(self.gate_proj).to(x_SW.dtype), counts_E), up)
        return grouped_linear(hidden, local(self.down_proj).to(x_SW.dtype), counts_E)


class MoE(Mixer):
    """Its tokens need not see each other: they leave for their experts' ranks from where the stream has cut
    them. The shared expert is an MLP, cut over tp as those are; it is computed while tokens travel, its
    first half on the way out and its second on the way back."""

    def __init__(self, d_model: int, config: MoEConfig, std: float, out_std: float, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        width = config.latent_dim or d_model
        self.router = Router(d_model, config, std, mesh)
        self.experts = Experts(width, config, std, out_std)
        latent = config.latent_dim is not None
        self.latent_in_proj = Linear(d_model, width, Normal(std)) if latent else None
        self.latent_out_proj = Linear(width, d_model, Normal(out_std)) if latent else None
        self.shared = (
            MLP(d_model, config.d_shared, config.activation, std, out_std, mesh) if config.d_shared else None
        )

    def forward(self, x_BLD: Tensor, packing: Packing, kept: Kept) -> tuple[Tensor, Report]:
        rows, tokens, length = self._real(x_BLD, packing)
        real_BLD = x_BLD[:rows, :tokens]
        choice = self.router(real_BLD, length, kept)
        if kept.dispatch is None:
            kept.dispatch = Dispatch(choice.expert_TK, self.config.num_experts, self.mesh)
        way, x_TD = kept.dispatch, real_BLD.flatten(0, 1)
        arrival = way.to_experts(x_TD if self.latent_in_proj is None else self.latent_in_proj(x_TD))
        hidden = self.shared.expand(x_BLD) if self.shared is not None else None
        returned = way.to_tokens(self.experts(*arrival()))
        shared = self.shared.contract(hidden) if self.shared is not None and hidden is not None else None
        outside = combine(returned(), choice.weight_TK, way.routing)
        if self.latent_out_proj is not None:
            outside = self.latent_out_proj(outside)
        y_BLD = outside.unflatten(0, (rows, tokens))
        if real_BLD.shape != x_BLD.shape:
            y_BLD = F.pad(y_BLD, (0, 0, 0, x_BLD.shape[1] - tokens, 0, x_BLD.shape[0] - rows))
        if shared is not None:
            y_BLD = y_BLD + shared
        return y_BLD, Report(choice.losses, way.routing.counts_E, choice.entropy)

    def _real(self, x_BLD: Tensor, packing: Packing) -> tuple[int, int, int]:
        """Of this rank's rows and tokens those that are no padding, and the tokens of a whole sequence."""
        rows, tokens, _ = x_BLD.shape
        if packing.cut is None:
            return rows, tokens, tokens
        before = tokens * self.mesh.tp.place
        return packing.cut.rows, min(tokens, max(0, packing.cut.tokens - before)), packing.cut.length
