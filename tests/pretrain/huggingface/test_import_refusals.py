"""Models that an import refuses: each in its one line, and nothing is left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.pretrain.huggingface import import_folder

CONFIGS = {
    "another model": (
        {"model_type": "llama"},
        'model_type = "llama" does not fit: only models of this type come in; '
        'only model_type = "nemotron_h" comes in',
    ),
    "quantized weights": (
        {"quantization_config": {"quant_method": "modelopt"}},
        'quantization_config = {"quant_method": "modelopt"} does not fit: quantized weights cannot be '
        "trained; only quantization_config = null comes in",
    ),
    "biases in Mamba-2": (
        {"use_bias": True},
        "use_bias = true does not fit: no projection has a bias; only use_bias = false comes in",
    ),
    "biases in Mamba-2 by another name": (
        {"mamba_proj_bias": True},
        "mamba_proj_bias = true does not fit: no projection has a bias; "
        "only mamba_proj_bias = false comes in",
    ),
    "no bias in the convolution": (
        {"use_conv_bias": False},
        "use_conv_bias = false does not fit: the convolution has a bias; only use_conv_bias = true comes in",
    ),
    "no bias in the convolution by an older name": (
        {"mamba_conv_bias": False},
        "use_conv_bias = false does not fit: the convolution has a bias; only use_conv_bias = true comes in",
    ),
    "biases in attention": (
        {"attention_bias": True},
        "attention_bias = true does not fit: no projection has a bias; only attention_bias = false comes in",
    ),
    "a sliding window": (
        {"sliding_window": 4096},
        "sliding_window = 4096 does not fit: attention sees the whole text before a token; "
        "only sliding_window = null comes in",
    ),
    "biases in MLPs": (
        {"mlp_bias": True},
        "mlp_bias = true does not fit: no projection has a bias; only mlp_bias = false comes in",
    ),
    "another activation of MLPs": (
        {"mlp_hidden_act": "gelu"},
        'mlp_hidden_act = "gelu" does not fit: MLPs and experts without a gate square a ReLU; '
        'only mlp_hidden_act = "relu2" comes in',
    ),
    "another activation of the convolution": (
        {"mamba_hidden_act": "gelu"},
        'mamba_hidden_act = "gelu" does not fit: the convolution is followed by SiLU; '
        'only mamba_hidden_act = "silu" comes in',
    ),
    "no layers": (
        {"layers_block_type": None},
        "names no layers; it needs hybrid_override_pattern or layers_block_type",
    ),
    "an empty pattern": (
        {"layers_block_type": None, "hybrid_override_pattern": ""},
        "its layers do not fit: the pattern is empty; a model needs a layer",
    ),
    "a pattern of other letters": (
        {"layers_block_type": None, "hybrid_override_pattern": "M*G"},
        'hybrid_override_pattern = "M*G": give a text of the letters M, *, - and E',
    ),
    "a kind of layer that is none": (
        {"layers_block_type": ["moe", "conv"]},
        'layers_block_type = ["moe", "conv"]: give a list of linear_attention, mamba, full_attention, '
        "attention, mlp, moe",
    ),
    "two patterns": (
        {"hybrid_override_pattern": "M*"},
        "hybrid_override_pattern = M* and layers_block_type, which is M*-EM, name other layers; "
        "drop the one that is wrong",
    ),
    "another number of layers": (
        {"num_hidden_layers": 3},
        "num_hidden_layers = 3, and its pattern M*-EM names 5; set num_hidden_layers = 5",
    ),
    "no width": ({"hidden_size": None}, "hidden_size is not set; bring the config.json of these weights"),
    "a width that is a text": (
        {"hidden_size": "32"},
        'hidden_size = "32": give a whole number, 1 or more',
    ),
    "a width beyond all bounds": (
        {"hidden_size": 10**30},
        "hidden_size = 1000000000000000000000000000000: give a whole number, 1 or more",
    ),
    "a head dim that is none": ({"head_dim": 0}, "head_dim = 0: give a whole number, 1 or more"),
    "a flag that is a number": ({"norm_topk_prob": 1}, "norm_topk_prob = 1: give true or false"),
    "a scale that is not finite": (
        {"routed_scaling_factor": float("nan")},
        "routed_scaling_factor = NaN: give a number between 0 and inf",
    ),
    "an epsilon of zero": (
        {"layer_norm_epsilon": 0},
        "layer_norm_epsilon = 0: give a number between 0 and 1",
    ),
    "a floor that is infinite": (
        {"time_step_min": {"__float__": "Infinity"}},
        'time_step_min = {"__float__": "Infinity"}: give a number between -inf and inf',
    ),
    "groups that do not divide": (
        {"n_groups": 3},
        "n_groups = 3: give a divisor of mamba_num_heads = 4",
    ),
    "kv heads that do not divide": (
        {"num_key_value_heads": 3},
        "num_key_value_heads = 3: give a divisor of num_attention_heads = 4",
    ),
    "a long convolution": ({"conv_kernel": 9}, "conv_kernel = 9: give 2 to 8"),
    "more choices than experts": (
        {"num_experts_per_tok": 5},
        "num_experts_per_tok = 5: give at most n_routed_experts = 4",
    ),
    "groups that do not divide the experts": (
        {"n_group": 3, "topk_group": 3},
        "n_group = 3: give a divisor of n_routed_experts = 4",
    ),
    "more groups than there are": (
        {"n_group": 2, "topk_group": 3},
        "topk_group = 3: give at most n_group = 2",
    ),
    "more choices than experts in the groups": (
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
        "num_experts_per_tok = 3: give at most 2, the experts in topk_group = 1 of 2 groups",
    ),
    "no groups": ({"n_group": 0}, "n_group = 0: give a whole number, 1 or more"),
}


def edit(path, changes):
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit(save_model, refusal, case):
    folder, _, _ = save_model()
    changes, line = CONFIGS[case]
    edit(folder / "config.json", changes)
    assert refusal(folder) == f"HF/config.json: {line}"


def test_keys_of_layers_that_are_not_there_say_nothing(save_model, tmp_path):
    folder, _, _ = save_model(layers_block_type=["full_attention"])
    edit(folder / "config.json", {"use_bias": True, "mlp_hidden_act": "gelu", "n_groups": 3, "expand": 7})
    assert import_folder(folder, tmp_path / "run").model.layers == "*"


SHAPES = {
    "vocab_size": (132, "model.safetensors: backbone.embeddings.weight", [131, 32], [132, 32]),
    "mamba_head_dim": (8, "model.safetensors: backbone.layers.0.mixer.in_proj.weight", [164, 32], [100, 32]),
    "head_dim": (16, "model.safetensors: backbone.layers.1.mixer.q_proj.weight", [32, 32], [64, 32]),
    "moe_intermediate_size": (
        12,
        "model.safetensors: backbone.layers.3.mixer.experts.0.up_proj.weight",
        [24, 32],
        [12, 32],
    ),
}


@pytest.mark.parametrize("key", SHAPES)
def test_shapes_that_contradict_the_config(save_model, refusal, key):
    folder, _, _ = save_model()
    value, name, there, asked = SHAPES[key]
    edit(folder / "config.json", {key: value})
    assert refusal(folder) == (
        f"HF/{name} has the shape {there}, and config.json asks for {asked}; "
        "bring the config.json that belongs to these weights"
    )


def test_another_number_of_stacked_experts(save_model, refusal):
    folder, _, _ = save_model("in memory")
    edit(folder / "config.json", {"n_routed_experts": 3})
    assert "has the shape [4, 32], and config.json asks for [3, 32]" in refusal(folder)
    edit(folder / "config.json", {"n_routed_experts": 4})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mixer.experts.up_proj"] = torch.zeros(5, 24, 32)
    save_file(tensors, file)
    assert "experts.up_proj has the shape [5, 24, 32], and config.json asks for [4, 24, 32]" in refusal(
        folder
    )


def change(folder, drop=(), add=None, file="model.safetensors"):
    tensors = {name: t for name, t in load_file(folder / file).items() if name not in drop}
    save_file(tensors | (add or {}), folder / file, metadata={"format": "pt"})


def test_a_number_of_experts_beyond_all_bounds(save_model, refusal):
    folder, _, _ = save_model()
    edit(folder / "config.json", {"n_routed_experts": 2**24})
    assert refusal(folder) == (
        "HF/config.json: n_routed_experts = 16777216, and no tensor here has so many rows; "
        "bring the config.json that belongs to these weights"
    )


def test_sizes_beyond_all_bounds(save_model, refusal):
    folder, _, _ = save_model()
    edit(folder / "config.json", dict.fromkeys(("hidden_size", "mamba_num_heads", "mamba_head_dim"), 2**24))
    assert refusal(folder) == ("HF/config.json: describes a model too large to be one; download it again")


def test_missing_tensors(save_model, refusal):
    folder, original, _ = save_model()
    change(folder, drop=["backbone.layers.3.mixer.experts.2.down_proj.weight"])
    assert refusal(folder) == (
        "HF: lacks backbone.layers.3.mixer.experts.2.down_proj.weight, which the model of its config.json "
        "has; bring the whole folder, or the config.json that belongs to it"
    )
    change(folder, drop=original)
    assert refusal(folder).startswith(
        "HF: lacks backbone.embeddings.weight, backbone.layers.0.norm.weight, "
        "backbone.layers.0.mixer.in_proj.weight and 39 more, which"
    )


def test_no_head_and_not_tied(save_model, refusal):
    folder, _, _ = save_model()
    change(folder, drop=["lm_head.weight"])
    assert refusal(folder).startswith("HF: lacks lm_head.weight, which the model")


def test_unknown_tensors_are_named(save_model, refusal):
    folder, _, _ = save_model()
    names = ["mtp.layers.0.norm.weight", "backbone.layers.99.norm.weight"]
    names += ["backbone.layers.0.mixer.in_proj.bias", "z"]
    change(folder, add={name: torch.zeros(2) for name in names})
    assert refusal(folder) == (
        "HF: holds backbone.layers.0.mixer.in_proj.bias, backbone.layers.99.norm.weight, "
        "mtp.layers.0.norm.weight and 1 more, which the model of its config.json has no place for; "
        "add --carry-unknown to keep such tensors unchanged"
    )


def test_a_tensor_by_two_names(save_model, refusal):
    folder, _, _ = save_model()
    change(folder, add={"model.norm_f.weight": torch.zeros(32)})
    assert refusal(folder, carry_unknown=True) == (
        "HF: holds backbone.norm_f.weight and model.norm_f.weight, which are one tensor; drop one of the two"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_do_not_widen(save_model, refusal, dtype):
    folder, original, _ = save_model()
    change(folder, add={"lm_head.weight": original["lm_head.weight"].to(dtype)})
    name = str(dtype).removeprefix("torch.")
    assert refusal(folder) == (
        f"HF/model.safetensors: lm_head.weight is {name}; only float32, bfloat16 and float16 come in, "
        "which fp32 holds exactly"
    )


def test_a_dtype_that_no_checkpoint_holds(save_model, refusal):
    folder, _, _ = save_model()
    change(folder, add={"mtp.count": torch.zeros(2, dtype=torch.uint16)})
    assert refusal(folder, carry_unknown=True).startswith(
        "HF/model.safetensors: mtp.count has the dtype U16; only F64, F32, F16, BF16"
    )
