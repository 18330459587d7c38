"""The router's choice against a loop over tokens, with groups of experts and without."""

import math

import pytest
import torch

from plait.parallel.mesh import Mesh
from plait.pretrain.config import MoEConfig
from plait.pretrain.model.layers import Kept
from plait.pretrain.model.moe import Router

WIDTH, BATCH, LENGTH = 16, 3, 41


def router_of(num_experts, num_groups, top_k_groups, top_k, **options) -> Router:
    """Weights and bias so large that every choice has its tokens."""
    config = MoEConfig(
        num_experts=num_experts,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        top_k=top_k,
        d_expert=8,
        **options,
    )
    router = Router(WIDTH, config, 0.02, Mesh.single()).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, WIDTH) / WIDTH**0.5)
        router.correction_bias.copy_(0.3 * torch.randn(num_experts))
    return router


def chosen_by_hand(merits: list[float], num_groups: int, top_k_groups: int, top_k: int) -> set[int]:
    """The best experts of the best groups, a group being worth its two best."""
    size = len(merits) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]

    def worth(group: list[int]) -> float:
        return sum(sorted((merits[e] for e in group), reverse=True)[:2])

    best = sorted(groups, key=worth, reverse=True)[:top_k_groups]
    return set(sorted((e for group in best for e in group), key=lambda e: -merits[e])[:top_k])


SIZES = [
    (8, 1, 1, 3),
    (8, 4, 2, 3),
    (8, 4, 2, 4),
    (12, 3, 2, 1),
    (12, 4, 1, 2),
    (12, 4, 4, 5),
    (6, 6, 3, 3),
    (6, 6, 4, 2),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_is_that_of_a_loop(sizes, score, shift):
    """Also where every score with its bias is below 0: experts of other groups are never chosen."""
    torch.manual_seed(2)
    router = router_of(*sizes, score=score, scaling=1.5)
    router.correction_bias += shift
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        choice = router(x, LENGTH, Kept(router.mesh))
        logits = x.flatten(0, 1) @ router.weight.T
    for token, (experts, weights) in enumerate(
        zip(choice.expert_TK.tolist(), choice.weight_TK.tolist(), strict=True)
    ):
        scores = [
            1 / (1 + math.exp(-z)) if score == "sigmoid" else math.exp(z) for z in logits[token].tolist()
        ]
        if score == "softmax":
            scores = [s / sum(scores) for s in scores]
        merits = [s + b for s, b in zip(scores, router.correction_bias.tolist(), strict=True)]
        assert set(experts) == chosen_by_hand(merits, *sizes[1:])
        assert len(experts) == sizes[3]
        total = sum(scores[e] for e in experts)
        assert weights == pytest.approx([1.5 * scores[e] / total for e in experts])


def test_groups_change_the_choice():
    """One expert stands out in a group that is worth less than another with two good ones."""
    router = router_of(4, 2, 1, 2)
    with torch.no_grad():
        router.weight.zero_()
        router.correction_bias.copy_(torch.tensor([0.9, 0.1, 0.6, 0.5]))
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64)
    choice = router(x, 1, Kept(router.mesh))
    assert choice.expert_TK.sort(-1).values.tolist() == [[2, 3]]
    assert choice.weight_TK.tolist() == [[0.5, 0.5]]
