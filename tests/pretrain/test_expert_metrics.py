"""What is said of the experts' balance: metrics of a step, the picture of loads."""

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch

from plait.parallel.mesh import Mesh
from plait.pretrain.config import MoEConfig
from plait.pretrain.config_file import parse_config
from plait.pretrain.expert_load import draw_loads
from plait.pretrain.model.layers import Cut, Kept, Packing
from plait.pretrain.model.moe import MoE, Router
from plait.pretrain.trainer import Trainer

WIDTH, BATCH, LENGTH, EXPERTS = 16, 3, 41, 6


def router_of(score: Literal["sigmoid", "softmax"], std: float) -> Router:
    config = MoEConfig(num_experts=EXPERTS, top_k=2, d_expert=8, score=score)
    router = Router(WIDTH, config, 0.02, Mesh.single()).double()
    with torch.no_grad():
        router.weight.copy_(std * torch.randn(EXPERTS, WIDTH))
    return router


def entropy_by_hand(logits: list[float], score: str) -> float:
    scores = [1 / (1 + math.exp(-z)) if score == "sigmoid" else math.exp(z) for z in logits]
    return -sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_entropy_is_that_of_each_tokens_shares(score):
    router = router_of(score, 0.7)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    entropy = router(x, LENGTH, Kept(router.mesh)).entropy
    assert not entropy.requires_grad
    logits = (x.flatten(0, 1) @ router.weight.detach().T).tolist()
    assert float(entropy) == pytest.approx(sum(entropy_by_hand(token, score) for token in logits), rel=1e-12)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_vanish_add_nothing(score, dtype):
    """A logit of -200 is 0 in fp32, as softmax and as sigmoid, and 0 log 0 is none."""
    router = router_of(score, 0).float()
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([0.0, 0.0, -200.0, -200.0, -200.0, -200.0])
    x = torch.ones(1, 1, WIDTH, dtype=dtype)
    entropy = router(x, 1, Kept(router.mesh)).entropy
    assert entropy.dtype == torch.float32
    assert float(entropy) == pytest.approx(math.log(2), rel=1e-6)


def test_padding_has_no_entropy():
    config = MoEConfig(num_experts=EXPERTS, top_k=2, d_expert=8)
    moe = MoE(WIDTH, config, 0.02, 0.02, Mesh.single()).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    padded = Packing(positions, None, cut=Cut(rows=2, tokens=30, length=30))
    _, report = moe(x, padded, Kept(moe.mesh))
    _, real = moe(x[:2, :30], Packing(positions[:2, :30], None), Kept(moe.mesh))
    assert float(report.router_entropy) == pytest.approx(float(real.router_entropy), rel=1e-12)
    with torch.no_grad():
        assert moe(x, padded, Kept(moe.mesh))[1].router_entropy is None


def first_step(tiny, **changes):
    """The first step's metrics, and what the routers saw, in the order of their calls."""
    tiny["model"]["pattern"] = "MEE"
    tiny["train"] |= {"dtype": "float64"} | changes
    trainer = Trainer(parse_config(tiny, "test"))
    seen = []
    for router in trainer.state.model.routers:
        # An expert that nobody wants, whatever its score.
        router.correction_bias[1] = -100
        router.register_forward_hook(lambda router, given, _: seen.append((router, given[0].detach())))
    weights = {router: router.weight.detach().clone() for router in trainer.state.model.routers}
    with trainer._loader() as loader:
        batch, _ = loader.next()
    metrics = trainer.train_step(batch)
    trainer.close()
    return metrics, [(weights[router], x) for router, x in seen]


def test_a_steps_metrics(tiny):
    metrics, seen = first_step(tiny)
    assert metrics["dead_experts"] == [1, 1]
    assert len(seen) == 2
    for entropy, (weight, x) in zip(metrics["router_entropy"], seen, strict=True):
        logits = (x.flatten(0, 1) @ weight.T).tolist()
        assert len(logits) == 4 * 50
        mean = sum(entropy_by_hand(token, "sigmoid") for token in logits) / len(logits)
        assert entropy == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"activation_checkpointing": True}], ids=str)
def test_do_not_depend_on_how_a_step_is_computed(tiny, tmp_path, changes):
    plain, seen = first_step(tiny)
    tiny["run"]["dir"] = str(tmp_path / "other")
    other, seen_there = first_step(tiny, **changes)
    assert len(seen_there) > len(seen)
    assert other["dead_experts"] == plain["dead_experts"]
    assert other["router_entropy"] == pytest.approx(plain["router_entropy"], rel=1e-12)


def test_the_picture_shows_loads_around_an_even_share():
    counts = [[0.0, 10.0, 10.0, 20.0], [30.0, 30.0, 30.0, 30.0]]
    figure = draw_loads(counts, [3, 7], 120)
    axes = figure.axes[0]
    (image,) = axes.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), [[0, 1, 1, 2], [1, 1, 1, 1]])
    assert image.get_clim() == (0, 2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "7"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert "120" in axes.get_title()


def test_the_picture_of_many_stays_readable():
    rows, columns = 64, 128
    layers = list(range(1, 2 * rows, 2))
    axes = draw_loads(torch.rand(rows, columns).tolist(), layers, 1).axes[0]
    shown = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert 16 <= len(shown) <= 32
    assert shown == [layers[int(place)] for place in axes.get_yticks()]
    assert 8 <= len(axes.get_xticklabels()) <= 16
    figure = axes.figure
    figure.canvas.draw()
    extent = axes.get_window_extent()
    assert extent.height / rows >= 8, "pixels a layer"
    assert extent.width / columns >= 6, "pixels an expert"
    lines = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(lines)), "labels overlap"
