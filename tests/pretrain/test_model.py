"""The hybrid: isolation of documents, initial values, precision, recomputation."""

from typing import Any

import pytest
import torch

from plait.pretrain.config_file import parse_config
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.model import EXACT_PARAMETERS, Hybrid, Packing, build_model

LENGTH = 37


def model_of(tiny, pattern=None, dtype=torch.float64, **options) -> Hybrid:
    if pattern:
        tiny["model"]["pattern"] = pattern
    return build_model(parse_config(tiny, "test").model, seed=5, dtype=dtype, **options)


def packed(batch=2) -> tuple[torch.Tensor, Any]:
    """Tokens of three documents a row, cut at 11 and 20."""
    tokens = torch.randint(320, (batch, LENGTH))
    ids = torch.zeros(batch, LENGTH, dtype=torch.int32)
    ids[:, 11:] += 1
    ids[:, 20:] += 1
    starts = torch.tensor([0, 11, 20])[ids.long()]
    return tokens, Packing(torch.arange(LENGTH).expand(batch, -1) - starts, ids)


@pytest.mark.parametrize(("pattern", "tolerance"), [("M*M-", 0.0), ("M*ME", 1e-12)])
def test_a_document_does_not_see_another(tiny, pattern, tolerance):
    tiny["model"]["attention"]["rope_theta"] = 10000.0
    model = model_of(tiny, pattern)
    tokens, packing = packed()
    changed = tokens.clone()
    changed[:, 11:20] = (changed[:, 11:20] + 1) % 320
    with torch.no_grad():
        a, b = model(tokens, packing)[0], model(changed, packing)[0]
    others = packing.document_ids_BL != 1
    assert (a[others] - b[others]).abs().max() <= tolerance
    assert (a[~others] - b[~others]).abs().max() > 1e-3


def test_a_packed_document_is_what_it_is_alone(tiny):
    tiny["model"]["attention"]["rope_theta"] = 10000.0
    model = model_of(tiny)
    tokens, packing = packed()
    alone = Packing(torch.arange(9).expand(2, -1), None)
    with torch.no_grad():
        together = model(tokens, packing)[0][:, 11:20]
        single = model(tokens[:, 11:20], alone)[0]
    torch.testing.assert_close(together, single, rtol=1e-10, atol=1e-11)


def test_initial_values_depend_on_name_and_seed_alone(tiny):
    small = dict(model_of(tiny, "M-").named_parameters())
    large = dict(model_of(tiny, "M-*E").named_parameters())
    norms = [name for name in small if "out_proj" not in name and "down_proj" not in name]
    assert norms
    assert all(torch.equal(small[name], large[name]) for name in norms)


def test_initial_values_follow_the_recipe(tiny):
    tiny["model"]["d_model"] = 256
    tiny["model"]["mamba"]["num_heads"] = 64
    p = {name: value.double() for name, value in model_of(tiny).named_parameters()}
    layers = 4
    assert p["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert p["layers.0.mixer.out_proj.weight"].std().item() == pytest.approx(0.02 / layers**0.5, rel=0.05)
    assert p["layers.3.mixer.experts.down_proj"].std().item() == pytest.approx(0.02 / layers**0.5, rel=0.05)
    A = p["layers.0.mixer.A_log"].exp()
    assert A.min() >= 1
    assert A.max() <= 16
    step = torch.nn.functional.softplus(p["layers.0.mixer.dt_bias"])
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 0.1 * 1.001
    assert p["layers.0.mixer.x_conv.weight"].abs().max() <= 0.5
    assert (p["layers.0.mixer.D"] == 1).all()


def grad_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def loss_of(model, dtype, tokens, packing):
    targets = tokens.roll(-1, 1).masked_fill(packing.positions_BL == 0, -100)
    counts = StepCounts(int((targets != -100).sum()), tokens.numel(), tokens.shape[0])
    return compute_loss(model, MicroBatch(tokens, targets, packing), counts, dtype=dtype)


def test_recomputation_changes_no_gradient(tiny):
    tiny["model"]["moe"] |= {"aux_loss": 0.1, "z_loss": 0.01}
    gradients = []
    for recompute in (False, True):
        model = model_of(tiny, activation_checkpointing=recompute)
        torch.manual_seed(1)
        parts = loss_of(model, torch.float64, *packed())
        parts.total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_micro_batches_add_up_to_the_batch(tiny):
    tiny["model"]["moe"] |= {"aux_loss": 0.1, "z_loss": 0.01}
    model = model_of(tiny)
    tokens, packing = packed(batch=4)
    targets = tokens.roll(-1, 1)
    targets[:3, 5:] = -100  # rows of very different numbers of targets
    counts = StepCounts(int((targets != -100).sum()), tokens.numel(), 4)
    totals = []
    for size in (4, 2, 1):
        model.zero_grad()
        loss = 0.0
        for rows in (slice(i, i + size) for i in range(0, 4, size)):
            part = Packing(packing.positions_BL[rows], packing.document_ids_BL[rows])
            micro = MicroBatch(tokens[rows], targets[rows], part)
            total = compute_loss(model, micro, counts, dtype=torch.float64).total
            total.backward()
            loss += total.item()
        totals.append((loss, {name: grad_of(p) for name, p in model.named_parameters()}))
    for loss, grads in totals[1:]:
        assert loss == pytest.approx(totals[0][0], rel=1e-13)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, totals[0][1][name], rtol=1e-9, atol=1e-13, msg=name)


def test_no_target_at_all_is_loss_zero(tiny):
    model = model_of(tiny)
    tokens, packing = packed()
    micro = MicroBatch(tokens, torch.full_like(tokens, -100), packing)
    parts = compute_loss(model, micro, StepCounts(0, tokens.numel(), 2), dtype=torch.float64)
    parts.total.backward()
    assert parts.total.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_bf16_computes_in_bf16_and_keeps_what_must_be_exact(tiny, monkeypatch):
    from plait.pretrain.model import mamba2, moe

    seen = {}
    begin, finish, linear = mamba2.ssd.begin, mamba2.ssd.finish, moe.F.linear

    def spy_begin(x, dt, A, B, **options):
        seen.update(x=x.dtype, dt=dt.dtype, A=A.dtype, dt_bias=options["dt_bias_H"].dtype)
        return begin(x, dt, A, B, **options)

    def spy_finish(pending, C, *, D_H):
        seen["D"] = D_H.dtype
        return finish(pending, C, D_H=D_H)

    def spy_linear(x, weight):
        seen.setdefault("router", set()).update({x.dtype, weight.dtype})
        return linear(x, weight)

    monkeypatch.setattr(mamba2.ssd, "begin", spy_begin)
    monkeypatch.setattr(mamba2.ssd, "finish", spy_finish)
    model = model_of(tiny, dtype=torch.float32)
    tokens, packing = packed()
    router = model.routers[0]
    monkeypatch.setattr(moe, "F", type("F", (), {"linear": staticmethod(spy_linear), "one_hot": None}))
    parts = loss_of(model, torch.bfloat16, tokens, packing)
    parts.total.backward()
    exact = {"dt": torch.float32, "A": torch.float32, "dt_bias": torch.float32, "D": torch.float32}
    assert seen == {"x": torch.bfloat16, "router": {torch.float32}, **exact}
    assert router.correction_bias.dtype == torch.float32
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.dtype == p.grad.dtype == torch.float32, name
    assert {
        end for end in EXACT_PARAMETERS if any(n.endswith(end) for n, _ in model.named_parameters())
    } == set(EXACT_PARAMETERS)


def test_bf16_loss_follows_fp32(tiny):
    model = model_of(tiny, dtype=torch.float32)
    tokens, packing = packed()
    exact, rounded = (
        loss_of(model, d, tokens, packing).total.item() for d in (torch.float32, torch.bfloat16)
    )
    assert rounded == pytest.approx(exact, rel=2e-3)


def test_the_balance_brings_the_bias_to_the_expert_that_lacks_tokens(tiny):
    router = model_of(tiny).routers[0]
    router.balance(torch.tensor([10, 0, 5, 5]))
    assert router.correction_bias.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0])


def test_balanced_experts_have_an_auxiliary_loss_of_one_a_sequence(tiny):
    tiny["model"]["moe"] |= {"aux_loss": 1.0, "top_k": 4}
    model = model_of(tiny, "E")
    with torch.no_grad():
        model.routers[0].weight.zero_()
    tokens, packing = packed()
    assert loss_of(model, torch.float64, tokens, packing).extra["aux_loss"].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"tie_embeddings": True},
        {"moe": {"activation": "swiglu", "score": "softmax", "latent_dim": 12, "norm_top_k": False}},
        {"mlp": {"activation": "swiglu"}},
        {"attention": {"qk_norm": True, "rope_theta": 1e4}},
        {"moe": {"d_shared": 0, "score_bias": False}},
    ],
    ids=str,
)
def test_every_option_trains(tiny, change):
    for key, value in change.items():
        if isinstance(value, dict):
            tiny["model"][key] |= value
        else:
            tiny["model"][key] = value
    model = model_of(tiny)
    parts = loss_of(model, torch.float64, *packed())
    parts.total.backward()
    assert parts.total.item() == pytest.approx(5.77, rel=0.02)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name
