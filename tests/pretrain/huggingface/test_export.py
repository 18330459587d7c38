"""The folder that an export writes: what is in it, when it appears, and what is refused in one line."""

import functools
import inspect
import json
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h import modeling_nemotron_h as modeling

from plait.errors import UserError
from plait.pretrain.huggingface import export, export_run, verify
from plait.pretrain.huggingface.verify import ExportError

PLAIN = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_the_files_and_the_config(four, save_run, tmp_path):
    four["model"]["moe"]["latent_dim"] = 12
    run, _ = save_run(four)
    exported = export_run(run, tmp_path / "out")
    assert names(exported.path) == PLAIN
    assert exported.files == {path.name: path.stat().st_size for path in exported.path.iterdir()}
    assert exported.step == 4
    assert exported.compared == "150 positions of the run's data"
    text = (exported.path / "config.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    config = json.loads(text)
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert config["hybrid_override_pattern"] == "M*-EM"
    assert config["num_hidden_layers"] == 5
    assert "layers_block_type" not in config
    assert "time_step_limit" not in config
    assert config["max_position_embeddings"] == 50
    wanted = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "moe_latent_size": 12,
        "head_dim": 8,
    }
    assert wanted.items() <= config.items()
    tokens = json.loads((exported.path / "generation_config.json").read_text())
    assert tokens == {"eos_token_id": 1, "pad_token_id": 0}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in exported.path.iterdir()}
    assert modes == {0o666 & stat.S_IMODE(exported.path.stat().st_mode)}


def test_a_dense_model_says_nothing_of_experts(tiny, save_run, tmp_path):
    tiny["model"]["pattern"] = "M*-"
    run, _ = save_run(tiny)
    config = json.loads((export_run(run, tmp_path / "out").path / "config.json").read_text())
    assert not [key for key in config if "expert" in key or "moe" in key or key.startswith("n_group_")]
    assert config["intermediate_size"] == 48
    assert "num_experts_per_tok" not in config


def test_the_card_tells_the_run(four, save_run, tmp_path):
    run, _ = save_run(four)
    record = {"step": 4, "loss": 3.25, "validation_loss": 3.5}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    card = (export_run(run, tmp_path / "out").path / "README.md").read_text()
    for fact in (
        "`M*-EM`",
        "400 tokens in 4 of 12 steps",
        "| Loss | 3.2500 nats a token |",
        "| Validation loss | 3.5000 nats a token |",
        "transformers 5.8.0 or later",
        'from_pretrained("out", dtype="float32")',
        "has not stated one yet",
        "must divide the 2 groups",
        "`tiny/train`",
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card
    assert "license:" not in card


def test_two_exports_are_equal(four, save_run, tmp_path):
    run, _ = save_run(four)
    first = contents(export_run(run, tmp_path / "a" / "out").path)
    second = contents(export_run(run, tmp_path / "b" / "out").path)
    assert first == second


def test_shards(four, save_run, tmp_path):
    run, _ = save_run(four)
    whole = export_run(run, tmp_path / "whole").path
    parts = export_run(run, tmp_path / "parts", shard_bytes=50_000).path
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(files) == {path.name for path in parts.glob("*.safetensors")}
    one, several = tensors(whole), tensors(parts)
    assert one.keys() == several.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in one.values())
    for file in files[:-1]:
        assert (parts / file).stat().st_size < 50_000 + 8_000


def test_what_stays_exact_in_bfloat16(four, save_run, tmp_path):
    run, _ = save_run(four)
    out = export_run(run, tmp_path / "out", dtype="bfloat16").path
    found = tensors(out)
    exact = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    ends = ("A_log", ".D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")
    assert exact == {name for name in found if name.endswith(ends)}
    assert {t.dtype for name, t in found.items() if name not in exact} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_float64_run(four, save_run, tmp_path):
    four["train"]["dtype"] = "float64"
    run, ours = save_run(four)
    assert ours.embedding.weight.dtype == torch.float64
    found = tensors(export_run(run, tmp_path / "out").path)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert torch.equal(found["lm_head.weight"], ours.head.weight.float())


def test_an_earlier_step(four, save_run, tmp_path):
    run, _ = save_run(four, steps=(4, 8))
    assert export_run(run, tmp_path / "newest").step == 8
    assert export_run(run, tmp_path / "four", step=4).step == 4
    with pytest.raises(UserError, match="holds no checkpoint of step 5; choose one of 4, 8"):
        export_run(run, tmp_path / "five", step=5)


def test_a_run_without_a_tokenizer(four, save_run, tmp_path):
    run, _ = save_run(four)
    (run / "tokenizer.model").unlink()
    exported = export_run(run, tmp_path / "out")
    assert not [name for name in names(exported.path) if "tokenizer" in name]
    assert any("has no tokenizer" in note for note in exported.notes)
    config = json.loads((exported.path / "config.json").read_text())
    assert config["eos_token_id"] is config["bos_token_id"] is config["pad_token_id"] is None


def test_shards_of_the_corpus_that_are_gone(four, save_run, tmp_path, monkeypatch):
    run, _ = save_run(four)
    monkeypatch.setattr(export, "open_sources", lambda *_: (_ for _ in ()).throw(UserError("gone")))
    assert "random ids" in export_run(run, tmp_path / "out").compared


def test_a_section_that_the_pattern_does_not_use_may_be_anything(four, save_run, tmp_path):
    four["model"]["pattern"] = "M*"
    four["model"]["mlp"]["activation"] = "swiglu"
    four["model"]["moe"]["score"] = "softmax"
    run, _ = save_run(four)
    assert export_run(run, tmp_path / "out").logit_error < 1e-4


def test_an_earlier_export_is_replaced(four, save_run, tmp_path):
    run, _ = save_run(four, steps=(4, 8))
    out = tmp_path / "out"
    out.mkdir()
    export_run(run, out, step=4, shard_bytes=50_000)
    before = contents(out)
    export_run(run, out)
    assert names(out) == PLAIN
    assert contents(out)["tokenizer.json"] == before["tokenizer.json"]
    assert tensors(out)["lm_head.weight"].shape == (320, 32)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_kernels_for_gpus_are_not_called_on_the_cpu(four, save_run, tmp_path, monkeypatch):
    @functools.wraps(inspect.unwrap(modeling.mamba2_chunk_scan))
    def kernel(*args, **options):
        raise RuntimeError("expected a CUDA tensor")

    monkeypatch.setattr(modeling, "mamba2_chunk_scan", kernel)
    run, _ = save_run(four)
    assert export_run(run, tmp_path / "out").logit_error < 1e-4
    assert modeling.mamba2_chunk_scan is kernel


def test_the_tie_of_two_experts_is_no_mismatch():
    """Positions before the first tie count, those after it in the same window do not."""
    ours = torch.tensor([[[0, 1], [0, 1], [0, 1]], [[0, 1], [2, 1], [0, 1]]])
    theirs = torch.tensor([[[1, 0], [0, 2], [0, 1]], [[0, 1], [1, 2], [0, 1]]])
    gap = torch.tensor([[1e-5, 1e-5, 1e-5], [0.1, 0.1, 0.1]])
    so_far = torch.ones(2, 3, dtype=torch.bool)
    same = verify._same_until_tie(ours, theirs, gap, so_far)
    assert same.tolist() == [[True, False, False], [True, True, True]]
    gap[0, 1] = 0.1
    with pytest.raises(ExportError, match="sends tokens to other experts"):
        verify._same_until_tie(ours, theirs, gap, so_far)


GAPS = {
    "experts alone": ([0.9, 0.5, 0.3, 0.1, 0.6, 0.8], (2, 1, 1), 0.2),
    "all experts": ([0.9, 0.5, 0.3, 0.1, 0.6, 0.8], (6, 1, 1), float("inf")),
    "groups closer than experts": ([0.9, 0.5, 0.7, 0.69, 0.6, 0.75], (1, 3, 1), 0.01),
    "experts of the chosen groups alone": ([0.9, 0.5, 0.55, 0.1, 0.6, 0.8], (3, 3, 2), 0.1),
    "all experts of the chosen groups": ([0.9, 0.5, 0.4, 0.1, 0.6, 0.8], (4, 3, 2), 0.9),
    "below zero": ([-0.9, -0.8, -0.3, -0.2, -0.6, -0.7], (1, 3, 2), 0.1),
}


@pytest.mark.parametrize("case", GAPS)
def test_how_close_a_choice_is(case):
    scores, (k, groups, chosen_groups), gap = GAPS[case]
    found = verify._gap(torch.tensor([scores]), k, groups, chosen_groups)
    torch.testing.assert_close(found, torch.tensor([gap]))


@pytest.mark.parametrize(("groups", "chosen"), [(2, 2), (4, 2)])
def test_groups_that_decide_nothing_are_none(four, save_run, tmp_path, groups, chosen):
    """All of them, and those of one expert: readers fail at these, and the choice is that of no groups."""
    four["model"]["moe"] |= {"num_groups": groups, "top_k_groups": chosen}
    run, _ = save_run(four)
    exported = export_run(run, tmp_path / "out")
    config = json.loads((exported.path / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (1, 1)
    assert not any("mlx" in note for note in exported.notes)


def test_what_transformers_keeps_of_tied_embeddings(four, save_run, tmp_path):
    four["model"]["tie_embeddings"] = True
    run, ours = save_run(four)
    exported = export_run(run, tmp_path / "out")
    found = tensors(exported.path)
    assert torch.equal(found["lm_head.weight"], found["backbone.embeddings.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(exported.path)
    assert torch.equal(loaded.lm_head.weight, ours.embedding.weight)
    assert any("model.tie_embeddings = true" in note for note in exported.notes)


def test_the_notes(four, save_run, tmp_path):
    four["model"]["mamba"] |= {"dt_limit": [0.01, float("inf")], "d_conv": 5}
    four["model"]["moe"] |= {"num_groups": 2, "top_k_groups": 1}
    run, _ = save_run(four)
    exported = export_run(run, tmp_path / "out")
    notes = "\n".join(exported.notes)
    for part in (
        "llama.cpp takes only one",
        "model.mamba.dt_limit = [0.01, inf]",
        "model.mamba.d_conv = 5",
        "model.moe.top_k_groups = 1 of 2: mlx",
    ):
        assert part in notes
    config = json.loads((exported.path / "config.json").read_text())
    assert config["time_step_min"] == 0.01
    assert config["time_step_limit"] == [0.01, 3.4028234663852886e38]


def test_the_command(four, save_run, tmp_path):
    run, _ = save_run(four)
    command = [sys.executable, "-m", "plait.launch", "export", str(run)]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for part in (
        "exported step 4",
        "model.safetensors",
        "transformers agrees: logits to",
        "load it:",
        "note",
    ):
        assert part in done.stdout
    assert "Loading weights" not in done.stderr
    failed = subprocess.run([*command, str(run)], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("plait: error: ")
    assert len(failed.stderr.splitlines()) == 1
