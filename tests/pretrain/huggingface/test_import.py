"""A Hugging Face folder becomes a run that computes the same and exports to the same bits."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from plait.data.tokenizer import load_tokenizer
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.config import ModelConfig
from plait.pretrain.config_file import parse_config
from plait.pretrain.huggingface import export_run, import_folder
from plait.pretrain.huggingface.names import from_files, tensor_map
from plait.pretrain.loading import load_run
from plait.pretrain.model import Packing
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.trainer import Trainer

TOLERANCE = 1e-4
"""Relative to the largest number of a tensor: both sides compute in fp32, in another order."""

DIALECTS = ["transformers", "nvidia", "in memory"]

CASES = {
    "two groups": {},
    "one group": {"n_groups": 1},
    "a group a head": {"n_groups": 4},
    "latent experts": {"moe_latent_size": 12},
    "odd widths of experts": {"moe_intermediate_size": 13, "moe_latent_size": 11},
    "weights not normed": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "a floor of step sizes": {"time_step_min": 0.05},
    "groups of experts": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2},
    "groups of experts, all of them taken": {"n_group": 2, "topk_group": 2},
    "no experts": {"layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    "only experts": {"layers_block_type": ["moe", "full_attention"], "moe_latent_size": 12},
}


def newest(run):
    checkpoint = Checkpoints(RunFolder(run).checkpoints).newest()
    assert checkpoint is not None
    return checkpoint


def load(imported):
    return load_run(str(imported.path)).model.requires_grad_(True)


def logits_of(model, ids):
    hidden, _ = model(ids, Packing(torch.arange(ids.shape[1]).expand_as(ids), None))
    return model.logits(hidden)


def relative(a, b):
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


def on_disk(name):
    """Where the table has a tensor of transformers' own state dict, but for its experts."""
    return name.replace("model.", "backbone.", 1) if name.startswith("model.") else name


def unstacked(tensors):
    """The names on disk, one tensor an expert, whatever the dialect."""
    found = {}
    for name, tensor in tensors.items():
        name = on_disk(name)
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            for expert, matrix in enumerate(tensor):
                found[name.replace(".experts.", f".experts.{expert}.") + ".weight"] = matrix
        else:
            found[name] = tensor
    return found


def assert_same_bits(back, original):
    """Every tensor of the original, in its shape and dtype, and nothing beside."""
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (back[name], tensor))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", CASES)
def test_every_bit_comes_back_and_numbers_agree(save_model, tensors_of, tmp_path, case, dialect):
    folder, original, theirs = save_model(dialect, **CASES[case])
    imported = import_folder(folder, tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert exported.logit_error < TOLERANCE
    assert exported.compared.endswith("random ids, as an imported model has no data")
    assert_same_bits(tensors_of(exported.path), unstacked(original))

    ids = torch.randint(131, (2, 37), generator=torch.Generator().manual_seed(1))
    ours = load(imported)
    ours_logits, theirs_logits = logits_of(ours, ids), theirs(ids, use_cache=False).logits
    assert relative(ours_logits, theirs_logits) < TOLERANCE
    for logits in (ours_logits, theirs_logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = unstacked({name: p.grad for name, p in theirs.named_parameters()})
    entries = [entry for entry in tensor_map(imported.model) if entry.name in gradients]
    assert len(entries) == len(gradients)
    wanted = from_files(entries, gradients.__getitem__)
    parameters = dict(ours.named_parameters())
    assert wanted.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        assert relative(wanted[name], parameter.grad) < TOLERANCE, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_comes_back(save_model, tensors_of, tmp_path, dtype):
    folder, original, _ = save_model("nvidia", dtype)
    assert {tensor.dtype for tensor in original.values()} == {dtype}
    imported = import_folder(folder, tmp_path / "run")
    assert imported.dtype == str(dtype).removeprefix("torch.")
    stored = newest(tmp_path / "run").tensors
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert_same_bits(tensors_of(exported.path), original)
    config = json.loads((exported.path / "config.json").read_text())
    assert config["torch_dtype"] == imported.dtype

    wide = tensors_of(export_run(tmp_path / "run", tmp_path / "wide", dtype="float32").path)
    assert_same_bits(wide, {name: tensor.float() for name, tensor in original.items()})


def test_every_tensor_keeps_a_dtype_of_its_own(save_model, tensors_of, tmp_path):
    """As published models have it: routers' biases in fp32 among bfloat16, and whatever else there is."""
    folder, original, _ = save_model(dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    for name in original:
        if name.endswith(("correction_bias", "norm_f.weight", "experts.1.up_proj.weight", "A_log")):
            original[name] = torch.randn(original[name].shape, generator=generator)
    save_file(original, folder / "model.safetensors", metadata={"format": "pt"})
    assert import_folder(folder, tmp_path / "run").dtype == "bfloat16"
    assert_same_bits(tensors_of(export_run(tmp_path / "run", tmp_path / "out").path), original)


def test_signed_zeros_subnormals_and_the_largest(save_model, tensors_of, tmp_path):
    folder, original, _ = save_model(dtype=torch.float16)
    odd = [-0.0, 6e-8, -6e-5, 65504.0, 1e-4]
    original["backbone.layers.2.mixer.up_proj.weight"][0, :5] = torch.tensor(odd, dtype=torch.float16)
    save_file(original, folder / "model.safetensors", metadata={"format": "pt"})
    import_folder(folder, tmp_path / "run")
    assert_same_bits(tensors_of(export_run(tmp_path / "run", tmp_path / "out").path), original)


@pytest.mark.parametrize("head", ["absent", "present"])
def test_tied_embeddings(save_model, tensors_of, tmp_path, head):
    folder, original, theirs = save_model(tie_word_embeddings=True)
    original["lm_head.weight"] = original["backbone.embeddings.weight"].clone()
    theirs.lm_head.weight = theirs.model.embeddings.weight
    given = {name: t for name, t in original.items() if head == "present" or name != "lm_head.weight"}
    save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
    imported = import_folder(folder, tmp_path / "run")
    assert imported.model.tie_embeddings
    assert any("would draw one at random" in note for note in imported.notes) == (head == "absent")
    ids = torch.arange(60).view(2, 30)
    assert relative(logits_of(load(imported), ids), theirs(ids, use_cache=False).logits) < TOLERANCE
    assert_same_bits(tensors_of(export_run(tmp_path / "run", tmp_path / "out").path), original)


def test_called_tied_but_with_a_head_of_its_own(save_model, tensors_of, tmp_path):
    folder, original, theirs = save_model("nvidia", tie_word_embeddings=True)
    assert not torch.equal(original["lm_head.weight"], original["backbone.embeddings.weight"])
    imported = import_folder(folder, tmp_path / "run")
    assert not imported.model.tie_embeddings
    assert any("another matrix than the embedding" in note for note in imported.notes)
    ids = torch.arange(60).view(2, 30)
    assert relative(logits_of(load(imported), ids), theirs(ids, use_cache=False).logits) < TOLERANCE
    assert_same_bits(tensors_of(export_run(tmp_path / "run", tmp_path / "out").path), original)


STEPS = {
    "silence is transformers' own floor": ({"time_step_min": None}, (0.001, float("inf")), "time_step_min"),
    "an export of no floor": ({"time_step_min": 1e-30}, (0.0, float("inf")), None),
    "time_step_limit counts for nothing": (
        {"time_step_min": 1e-30, "time_step_limit": [0.02, 0.5]},
        (0.0, float("inf")),
        "time_step_limit = [0.02, 0.5]: transformers clamps at time_step_min alone",
    ),
    "an infinity as an object": (
        {"time_step_min": 0.25, "time_step_limit": [0.0, {"__float__": "Infinity"}]},
        (0.25, float("inf")),
        "time_step_min = 0.25",
    ),
    "an older name": ({"mamba_dt_min": 0.125}, (0.125, float("inf")), "time_step_min = 0.125"),
}


@pytest.mark.parametrize("case", STEPS)
def test_limits_of_step_sizes(save_model, tmp_path, case):
    folder, _, _ = save_model()
    keys, limit, note = STEPS[case]
    tree = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    imported = import_folder(folder, tmp_path / "run")
    assert imported.model.mamba is not None
    assert imported.model.mamba.dt_limit == limit
    found = [text for text in imported.notes if text.startswith("time_step")]
    assert len(found) == (note is not None)
    assert note is None or note in found[0]


def test_an_export_of_plait_comes_back_as_it_went(four, save_run, tmp_path):
    four["model"]["mamba"]["dt_limit"] = [0.05, float("inf")]
    four["model"]["moe"] |= {"num_experts": 6, "num_groups": 3, "top_k_groups": 2}
    run, _ = save_run(four)
    first = export_run(run, tmp_path / "first", dtype="bfloat16").path
    imported = import_folder(first, tmp_path / "again")
    assert imported.model == parse_config(four, "test").model
    assert [note for note in imported.notes if "time_step_limit" in note] == []
    second = export_run(tmp_path / "again", tmp_path / "second").path
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    # The sentencepiece model goes along, so that corpora built with it fit.
    assert imported.tokenizer is not None
    assert imported.tokenizer.fingerprint == load_tokenizer(run).fingerprint
    assert RunFolder(tmp_path / "again").tokenizer_file.is_file()


def test_the_run_s_folder(save_model, tmp_path):
    folder, _, _ = save_model("nvidia")
    imported = import_folder(folder, tmp_path / "run")
    assert sorted(p.name for p in imported.path.iterdir()) == ["checkpoints", "config.yaml"]
    tree = yaml.safe_load((imported.path / "config.yaml").read_text())
    assert list(tree) == ["model"]
    assert ModelConfig.model_validate(tree["model"]) == imported.model
    facts = newest(imported.path).manifest.facts
    assert (facts["step"], facts["samples"], facts["tokens"]) == (0, 0, 0)
    origin = facts["origin"]["huggingface"]
    assert (origin["folder"], origin["dtype"]) == ("hf", "float32")
    assert any("has no tokenizer.json and no tokenizer.model" in note for note in imported.notes)
    exported = export_run(imported.path, tmp_path / "out")
    assert any("the model speaks in ids" in note for note in exported.notes)
    card = (exported.path / "README.md").read_text()
    assert "imported into plait from `hf`, its weights unchanged," in card
    assert "That of `hf` holds for what came from there" in card
    assert "Trained on" not in card


def test_ids_and_positions_of_the_folder_stay(save_model, tmp_path):
    folder, _, _ = save_model(eos_token_id=[7, 11], bos_token_id=5, max_position_embeddings=262144)
    import_folder(folder, tmp_path / "run")
    out = export_run(tmp_path / "run", tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([7, 11], 5, 0)
    assert config["max_position_embeddings"] == 262144
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [7, 11]


@pytest.fixture
def trained(tiny, tmp_path):
    """A config that goes on from the import at tmp_path / "run"."""
    del tiny["model"]
    tiny["run"]["dir"] = str(tmp_path / "on")
    tiny["checkpoint"]["init_from"] = str(tmp_path / "run")
    tiny["train"]["steps"] = 4
    return tiny


def train(tree, tmp_path, *overrides):
    from plait.pretrain.callbacks import Checkpointing
    from plait.pretrain.config_file import load_config

    file = tmp_path / "on.yaml"
    file.write_text(yaml.safe_dump(tree))
    trainer = Trainer(load_config(file, overrides), [Checkpointing()])
    trainer.run()
    return trainer


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_import_trains_on_and_exports(save_model, tensors_of, trained, tmp_path, dialect):
    folder, original, _ = save_model(dialect, torch.bfloat16, vocab_size=321)
    imported = import_folder(folder, tmp_path / "run")
    trainer = train(trained, tmp_path)
    assert trainer.config.model == imported.model
    exported = export_run(tmp_path / "on", tmp_path / "out")
    back = tensors_of(exported.path)
    assert back.keys() == unstacked(original).keys()
    # In the dtype of the folder, but for what training makes into numbers that need fp32.
    assert back["lm_head.weight"].dtype == torch.bfloat16
    assert back["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert not torch.equal(back["lm_head.weight"], original["lm_head.weight"])
    assert exported.compared.endswith("of the run's data")
    assert (
        "imported into plait from `hf`, trained on and written" in (exported.path / "README.md").read_text()
    )


UNKNOWN = {
    "mtp.layers.0.eh_proj.weight": torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5),
    "mtp.layers.0.mixer.experts.0.up_proj.weight": torch.linspace(0, 1, 7).bfloat16(),
    "backbone.layers.99.mixer.experts.1.up_proj.weight": torch.arange(8.0).view(4, 2).to(torch.float8_e4m3fn),
    "backbone.layers.99.norm.weight": torch.arange(4.0),
    "extra.count": torch.tensor(17),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_carried_comes_back_also_after_training(save_model, tensors_of, trained, tmp_path, dialect):
    folder, _, _ = save_model(dialect, vocab_size=321, num_nextn_predict_layers=1)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(shard) | UNKNOWN, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        tree = json.loads(index.read_text())
        tree["weight_map"] |= dict.fromkeys(UNKNOWN, shard.name)
        index.write_text(json.dumps(tree))
    original = tensors_of(folder)
    imported = import_folder(folder, tmp_path / "run", carry_unknown=True)
    assert imported.carried == sorted(UNKNOWN)
    assert {f"carried.{name}" for name in UNKNOWN} < newest(imported.path).tensors.keys()
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert exported.logit_error < TOLERANCE
    assert_same_bits(tensors_of(exported.path), unstacked(original))
    assert json.loads((exported.path / "config.json").read_text())["num_nextn_predict_layers"] == 1

    train(trained, tmp_path, "train.stop_at=2")
    resumed = train(trained, tmp_path)
    assert (resumed.resumed_from, resumed.state.step) == (2, 4)
    exported = export_run(tmp_path / "on", tmp_path / "after")
    assert any("are written as they were imported" in note for note in exported.notes)
    back = tensors_of(exported.path)
    assert_same_bits({name: back[name] for name in UNKNOWN}, UNKNOWN)
