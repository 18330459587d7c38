"""What an import refuses: each in its one line, and nothing is left behind."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.errors import UserError
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


def refusal(tmp_path, folder, **options) -> str:
    """The line, without the folder's path; nothing else than the folder must be there after it."""
    with pytest.raises(UserError) as caught:
        import_folder(folder, tmp_path / "run", **options)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "HF")


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit(save_model, tmp_path, case):
    folder, _, _ = save_model()
    changes, line = CONFIGS[case]
    edit(folder / "config.json", changes)
    assert refusal(tmp_path, folder) == f"HF/config.json: {line}"


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
def test_shapes_that_contradict_the_config(save_model, tmp_path, key):
    folder, _, _ = save_model()
    value, name, there, asked = SHAPES[key]
    edit(folder / "config.json", {key: value})
    assert refusal(tmp_path, folder) == (
        f"HF/{name} has the shape {there}, and config.json asks for {asked}; "
        "bring the config.json that belongs to these weights"
    )


def test_another_number_of_stacked_experts(save_model, tmp_path):
    folder, _, _ = save_model("in memory")
    edit(folder / "config.json", {"n_routed_experts": 3})
    assert "has the shape [4, 32], and config.json asks for [3, 32]" in refusal(tmp_path, folder)
    edit(folder / "config.json", {"n_routed_experts": 4})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mixer.experts.up_proj"] = torch.zeros(5, 24, 32)
    save_file(tensors, file)
    assert "experts.up_proj has the shape [5, 24, 32], and config.json asks for [4, 24, 32]" in refusal(
        tmp_path, folder
    )


def change(folder, drop=(), add=None, file="model.safetensors"):
    tensors = {name: t for name, t in load_file(folder / file).items() if name not in drop}
    save_file(tensors | (add or {}), folder / file, metadata={"format": "pt"})


def test_a_number_of_experts_beyond_all_bounds(save_model, tmp_path):
    folder, _, _ = save_model()
    edit(folder / "config.json", {"n_routed_experts": 2**24})
    assert refusal(tmp_path, folder) == (
        "HF/config.json: n_routed_experts = 16777216, and no tensor here has so many rows; "
        "bring the config.json that belongs to these weights"
    )


def test_sizes_beyond_all_bounds(save_model, tmp_path):
    folder, _, _ = save_model()
    edit(folder / "config.json", dict.fromkeys(("hidden_size", "mamba_num_heads", "mamba_head_dim"), 2**24))
    assert refusal(tmp_path, folder) == (
        "HF/config.json: describes a model too large to be one; download it again"
    )


def test_missing_tensors(save_model, tmp_path):
    folder, original, _ = save_model()
    change(folder, drop=["backbone.layers.3.mixer.experts.2.down_proj.weight"])
    assert refusal(tmp_path, folder) == (
        "HF: lacks backbone.layers.3.mixer.experts.2.down_proj.weight, which the model of its config.json "
        "has; bring the whole folder, or the config.json that belongs to it"
    )
    change(folder, drop=original)
    assert refusal(tmp_path, folder).startswith(
        "HF: lacks backbone.embeddings.weight, backbone.layers.0.norm.weight, "
        "backbone.layers.0.mixer.in_proj.weight and 39 more, which"
    )


def test_no_head_and_not_tied(save_model, tmp_path):
    folder, _, _ = save_model()
    change(folder, drop=["lm_head.weight"])
    assert refusal(tmp_path, folder).startswith("HF: lacks lm_head.weight, which the model")


def test_unknown_tensors_are_named(save_model, tmp_path):
    folder, _, _ = save_model()
    names = ["mtp.layers.0.norm.weight", "backbone.layers.99.norm.weight"]
    names += ["backbone.layers.0.mixer.in_proj.bias", "z"]
    change(folder, add={name: torch.zeros(2) for name in names})
    assert refusal(tmp_path, folder) == (
        "HF: holds backbone.layers.0.mixer.in_proj.bias, backbone.layers.99.norm.weight, "
        "mtp.layers.0.norm.weight and 1 more, which the model of its config.json has no place for; "
        "add --carry-unknown to keep such tensors unchanged"
    )


def test_a_tensor_by_two_names(save_model, tmp_path):
    folder, _, _ = save_model()
    change(folder, add={"model.norm_f.weight": torch.zeros(32)})
    assert refusal(tmp_path, folder, carry_unknown=True) == (
        "HF: holds backbone.norm_f.weight and model.norm_f.weight, which are one tensor; drop one of the two"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_do_not_widen(save_model, tmp_path, dtype):
    folder, original, _ = save_model()
    change(folder, add={"lm_head.weight": original["lm_head.weight"].to(dtype)})
    name = str(dtype).removeprefix("torch.")
    assert refusal(tmp_path, folder) == (
        f"HF/model.safetensors: lm_head.weight is {name}; only float32, bfloat16 and float16 come in, "
        "which fp32 holds exactly"
    )


def test_a_dtype_that_no_checkpoint_holds(save_model, tmp_path):
    folder, _, _ = save_model()
    change(folder, add={"mtp.count": torch.zeros(2, dtype=torch.uint16)})
    assert refusal(tmp_path, folder, carry_unknown=True).startswith(
        "HF/model.safetensors: mtp.count has the dtype U16; only F64, F32, F16, BF16"
    )


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(save_model, tmp_path, length):
    folder, _, _ = save_model()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    line = refusal(tmp_path, folder)
    assert line.startswith("HF/model.safetensors: not a whole safetensors file (")
    assert line.endswith("); download it again")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json(save_model, tmp_path, name, content):
    folder, _, _ = save_model("nvidia")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    reason = "holds list, not an object of keys" if content == "[1, 2]" else "not JSON, perhaps cut off"
    assert refusal(tmp_path, folder) == f"HF/{name}: {reason}; download it again"


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unnamed_shards(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


FOLDERS = {
    "pickles": (
        pickles,
        "HF: its weights are pickles (pytorch_model.bin), which can run code and are never opened; "
        "save the model as safetensors",
    ),
    "shards without an index": (
        unnamed_shards,
        "HF: holds model-00001-of-00002.safetensors but no model.safetensors and no "
        "model.safetensors.index.json; bring the whole folder",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "HF: holds no safetensors file; name a folder with model.safetensors or model.safetensors.index.json",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "HF/config.json: No such file or directory; bring the whole folder",
    ),
    "no folder": (
        shutil.rmtree,
        "HF: no such folder; name one that holds config.json and safetensors files",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_whole(save_model, tmp_path, case):
    folder, _, _ = save_model()
    spoil, line = FOLDERS[case]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        import_folder(folder, tmp_path / "run")
    assert str(caught.value).replace(str(folder), "HF") == line
    assert not (tmp_path / "run").exists()


FIRST, LAST = "backbone.embeddings.weight", "lm_head.weight"

PLACES = [
    "../secret.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "..",
    "",
    "model.bin",
    7,
    None,
    ["model.safetensors"],
    "a\0b.safetensors",
]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_that_leads_out_of_the_folder(save_model, tmp_path, place):
    folder, _, _ = save_model("nvidia")
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"][FIRST] = place
    index.write_text(json.dumps(tree))
    assert refusal(tmp_path, folder) == (
        f"HF/model.safetensors.index.json: places {FIRST} in {json.dumps(place)}, which is no safetensors "
        "file of this folder; download it again"
    )


def test_an_index_that_lies(save_model, tmp_path):
    folder, _, _ = save_model("nvidia")
    index = folder / "model.safetensors.index.json"
    honest = json.loads(index.read_text())
    places = honest["weight_map"]
    here, there = places[FIRST], places["backbone.norm_f.weight"]
    assert here != there

    def say(weight_map):
        index.write_text(json.dumps(honest | {"weight_map": weight_map}))
        return refusal(tmp_path, folder)

    name = "HF/model.safetensors.index.json"
    assert say({FIRST: there} | {k: v for k, v in places.items() if k != FIRST}) == (
        f"{name}: places {FIRST} in {there}, which does not hold it; download both again"
    )
    assert say(places | {"mtp.x": there}) == (
        f"{name}: places mtp.x in {there}, which does not hold it; download both again"
    )
    assert say({k: v for k, v in places.items() if k != FIRST}) == (
        f"{name}: does not place {FIRST} in {here}, which holds it; download both again"
    )
    assert say(places | {FIRST: "model-00009-of-00009.safetensors"}) == (
        "HF/model-00009-of-00009.safetensors: missing, and model.safetensors.index.json names it; "
        "bring the whole folder"
    )
    for nothing in ({}, [], None):
        assert say(nothing) == f"{name}: has no weight_map of tensors and files; download it again"


def test_links_as_the_hub_s_cache_makes_them(save_model, tmp_path):
    folder, _, _ = save_model("nvidia")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        os.symlink(f"../blobs/{number}", file)
    assert import_folder(folder, tmp_path / "run").model.layers == "M*-EM"


def test_what_is_at_the_run_s_place_stays(save_model, tmp_path):
    folder, _, _ = save_model()
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"run: exists and is not empty; choose another name for the run"):
        import_folder(folder, run)
    (run / "thesis.tex").unlink()
    import_folder(folder, run)
    with pytest.raises(UserError, match="exists and is not empty"):
        import_folder(folder, run)
    with pytest.raises(UserError, match="is no folder; choose another name for the run"):
        import_folder(folder, folder / "config.json")


def test_a_full_disk(save_model, tmp_path, monkeypatch):
    folder, _, _ = save_model()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plait.pretrain.checkpoint.files.HashingFile.append", full)
    assert "No space left on device" in refusal(tmp_path, folder)
