"""The table of names: every tensor once, there and back without a changed bit."""

import pytest
import torch

from plait.errors import UserError
from plait.pretrain.config_file import parse_config
from plait.pretrain.huggingface.names import from_files, join, split, tensor_map
from plait.pretrain.model import build_model


def model_and_map(tree):
    config = parse_config(tree, "test").model
    return build_model(config, seed=1), tensor_map(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("latent", [None, 12])
def test_there_and_back_keeps_every_bit(four, tied, latent):
    four["model"]["tie_embeddings"] = tied
    four["model"]["moe"]["latent_dim"] = latent
    model, entries = model_and_map(four)
    state = model.state_dict()
    files = {entry.name: join(entry, state) for entry in entries}
    assert len(files) == len(entries)
    assert all(tuple(files[entry.name].shape) == entry.shape for entry in entries)
    back = from_files(entries, files.__getitem__)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert all(back[name].dtype == state[name].dtype for name in state)


def test_every_tensor_is_used_once(four):
    model, entries = model_and_map(four)
    used = [(part.name, part.expert) for entry in entries for part in entry.parts]
    assert len(used) == len(set(used))
    assert {name for name, _ in used} == model.state_dict().keys()


def test_the_borders_of_the_fused_projection(four):
    _, entries = model_and_map(four)
    fused = next(entry for entry in entries if entry.name == "backbone.layers.0.mixer.in_proj.weight")
    rows = {part.name.split(".")[-2]: part.shape[0] for part in fused.parts}
    assert rows == {"z_proj": 64, "x_proj": 64, "b_proj": 16, "c_proj": 16, "dt_proj": 4}
    tensor = torch.arange(fused.shape[0])[:, None].expand(fused.shape)
    firsts = {part.name.split(".")[-2]: int(piece[0, 0]) for part, piece in split(fused, tensor)}
    assert firsts == {"z_proj": 0, "x_proj": 64, "b_proj": 128, "c_proj": 144, "dt_proj": 160}


def test_the_names_that_readers_know(four):
    four["model"]["moe"]["latent_dim"] = 12
    shapes = {entry.name: entry.shape for entry in model_and_map(four)[1]}
    expected = {
        "backbone.embeddings.weight": (320, 32),
        "backbone.layers.0.norm.weight": (32,),
        "backbone.layers.0.mixer.conv1d.weight": (96, 1, 4),
        "backbone.layers.0.mixer.conv1d.bias": (96,),
        "backbone.layers.0.mixer.dt_bias": (4,),
        "backbone.layers.0.mixer.A_log": (4,),
        "backbone.layers.0.mixer.D": (4,),
        "backbone.layers.0.mixer.norm.weight": (64,),
        "backbone.layers.0.mixer.out_proj.weight": (32, 64),
        "backbone.layers.1.mixer.k_proj.weight": (16, 32),
        "backbone.layers.2.mixer.up_proj.weight": (48, 32),
        "backbone.layers.3.mixer.gate.weight": (4, 32),
        "backbone.layers.3.mixer.gate.e_score_correction_bias": (4,),
        "backbone.layers.3.mixer.experts.3.down_proj.weight": (12, 24),
        "backbone.layers.3.mixer.shared_experts.up_proj.weight": (16, 32),
        "backbone.layers.3.mixer.fc1_latent_proj.weight": (12, 32),
        "backbone.layers.3.mixer.fc2_latent_proj.weight": (32, 12),
        "backbone.norm_f.weight": (32,),
        "lm_head.weight": (320, 32),
    }
    assert expected.items() <= shapes.items()


def test_a_tensor_of_another_shape(four):
    model, entries = model_and_map(four)
    files = {entry.name: join(entry, model.state_dict()) for entry in entries}
    files["lm_head.weight"] = files["lm_head.weight"][:-1]
    with pytest.raises(UserError, match=r"lm_head\.weight has the shape \(319, 32\) .* wants \(320, 32\)"):
        from_files(entries, files.__getitem__)


def test_two_matrices_do_not_become_one_tied(four):
    four["model"]["tie_embeddings"] = True
    model, entries = model_and_map(four)
    files = {entry.name: join(entry, model.state_dict()).clone() for entry in entries}
    files["lm_head.weight"][3, 3] += 1
    with pytest.raises(UserError, match=r"set model\.tie_embeddings = false"):
        from_files(entries, files.__getitem__)


def test_a_tensor_without_a_place(four):
    four["model"]["mlp"]["activation"] = "swiglu"
    with pytest.raises(ValueError, match=r"no place for layers\.2\.mixer\.gate_proj\.weight"):
        tensor_map(parse_config(four, "test").model)
