"""What an export refuses, in one line and without leaving anything behind."""

import json
import os

import pytest
import torch

from plait.errors import UserError
from plait.pretrain.huggingface import export, export_run, placing, tokenizer, verify
from plait.pretrain.huggingface.verify import ExportError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


MISFITS = {
    ("mamba", "dt_limit", (0.0, 0.5)): "only model.mamba.dt_limit = [0.0, .inf] exports",
    ("attention", "rope_theta", 10000.0): "model.attention.rope_theta = 10000.0 does not fit",
    ("attention", "qk_norm", True): "model.attention.qk_norm = true does not fit",
    ("mlp", "activation", "swiglu"): "only model.mlp.activation = squared_relu exports",
    ("moe", "activation", "swiglu"): "only model.moe.activation = squared_relu exports",
    ("moe", "score", "softmax"): "only model.moe.score = sigmoid exports",
    ("moe", "d_shared", 0): "only model.moe.d_shared = 1 or more exports",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_model_that_does_not_fit(four, save_run, tmp_path, misfit):
    section, key, value = misfit
    four["model"][section][key] = value
    run, _ = save_run(four)
    with pytest.raises(UserError) as caught:
        export_run(run, tmp_path / "out")
    assert MISFITS[misfit] in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_single_expert_does_not_fit(four, save_run, tmp_path):
    four["model"]["moe"] |= {"num_experts": 1, "top_k": 1}
    run, _ = save_run(four)
    with pytest.raises(UserError, match=r"model\.moe\.num_experts = 1 does not fit"):
        export_run(run, tmp_path / "out")


def test_what_is_no_export_stays(four, save_run, tmp_path):
    run, _ = save_run(four)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no export of plait"):
        export_run(run, out)
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    export_run(run, out)
    (out / "LICENSE").write_text("mine")
    with pytest.raises(UserError, match=r"files that are not its own \(LICENSE\)"):
        export_run(run, out)
    assert (out / "LICENSE").read_text() == "mine"
    with pytest.raises(UserError, match="is no folder"):
        export_run(run, tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="is no export of plait"):
        export_run(run, run)


def break_a_logit(monkeypatch):
    real = verify.compute

    def broken(model, tokens):
        outputs = real(model, tokens)
        outputs.logits_BLV[1, 7, 3] += 1e-3 * outputs.logits_BLV.abs().max()
        return outputs

    monkeypatch.setattr(export, "compute", broken)


def break_a_name(monkeypatch):
    real = export.tensor_map

    def broken(config):
        return [entry for entry in real(config) if not entry.name.endswith("dt_bias")]

    monkeypatch.setattr(export, "tensor_map", broken)


def break_an_id(monkeypatch):
    real = tokenizer.convert_tokenizer

    def broken(path):
        converted = real(path)
        tree = json.loads(converted.files["tokenizer.json"])
        tree["model"]["merges"] = tree["model"]["merges"][1:]
        converted.files["tokenizer.json"] = json.dumps(tree)
        return converted

    monkeypatch.setattr(tokenizer, "convert_tokenizer", broken)


def break_the_router(monkeypatch):
    """Another bias weighs nothing in the logits: it sends tokens elsewhere."""
    write = export.write_shards

    def broken(folder, entries, tensors, **options):
        changed = {
            name: -tensor if name.endswith("correction_bias") else tensor for name, tensor in tensors.items()
        }
        write(folder, entries, changed, **options)

    monkeypatch.setattr(export, "write_shards", broken)


def forget_the_groups(monkeypatch):
    write = export.config_json
    none = {"n_group": 1, "topk_group": 1}
    monkeypatch.setattr(export, "config_json", lambda *args, **options: write(*args, **options) | none)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_a_logit, "computes other logits than plait, by 1.0e-03"),
        (break_a_name, "missing_keys"),
        (break_an_id, r"gives other ids than .*run/tokenizer\.model for a text"),
        (break_the_router, "sends tokens to other experts"),
        (forget_the_groups, "sends tokens to other experts"),
    ],
)
def test_a_mismatch_leaves_nothing(four, save_run, tmp_path, monkeypatch, fault, message):
    four["model"]["moe"] |= {"num_experts": 12, "num_groups": 4, "top_k_groups": 2}
    run, _ = save_run(four)
    before = contents(export_run(run, tmp_path / "out").path)
    fault(monkeypatch)
    for out in (tmp_path / "out", tmp_path / "other"):
        with pytest.raises(ExportError, match=message):
            export_run(run, out)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_weights_that_are_not_finite(four, save_run, tmp_path, monkeypatch):
    run, _ = save_run(four)
    real = export._load

    def diverged(*args):
        model, carried = real(*args)
        with torch.no_grad():
            model.embedding.weight.fill_(float("nan"))
        return model, carried

    monkeypatch.setattr(export, "_load", diverged)
    with pytest.raises(ExportError, match="not finite"):
        export_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_full_disk(four, save_run, tmp_path, monkeypatch):
    run, _ = save_run(four)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_shards", full)
    with pytest.raises(UserError, match=r"out: cannot be written: No space left on device; make room"):
        export_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_old_export_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"exported_by": "plait 0"}))
    real = os.rename

    def refuse(source, target, **options):
        if str(source).endswith(".tmp"):
            raise PermissionError(13, "Permission denied")
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="Permission denied"), placing.appearing(out):
        pass
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json"]


def test_a_number_that_float16_cannot_hold(four, save_run, tmp_path, monkeypatch):
    run, _ = save_run(four)
    real = export._load

    def large(*args):
        model, carried = real(*args)
        with torch.no_grad():
            model.final_norm.weight[0] = 1e5
        return model, carried

    monkeypatch.setattr(export, "_load", large)
    with pytest.raises(UserError) as caught:
        export_run(run, tmp_path / "out", dtype="float16")
    assert str(caught.value) == (
        "dtype = float16 cannot hold backbone.norm_f.weight, which reaches 1e+05; choose bfloat16 or float32"
    )
    assert not (tmp_path / "out").exists()
