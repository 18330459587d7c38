"""A fork goes on from its parent's checkpoint as the parent would, but for what its config changes."""

import json
import shutil

import pytest
import yaml

from plait.pretrain.callbacks import Checkpointing, MetricsFile
from plait.pretrain.checkpoint import Checkpoint, Checkpoints
from plait.pretrain.config_file import load_config, parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.trainer import Trainer

CLOCKS = ("tokens_per_second", "step_seconds", "data_seconds", "mfu")


def train(config) -> Trainer:
    trainer = Trainer(config, [MetricsFile(), Checkpointing()])
    trainer.run()
    return trainer


def numbers(folder) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in CLOCKS}
        for record in read_metrics(RunFolder(folder).metrics_file)
    ]


def newest_of(folder) -> Checkpoint:
    newest = Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    return newest


@pytest.fixture(scope="module")
def parent(tmp_path_factory, corpus):
    """A run of eight steps with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    tree = yaml.safe_load(f"""
        run: {{dir: {folder}, seed: 3}}
        model: {{pattern: M, d_model: 16, vocab_size: 320, mamba: {{num_heads: 2, head_dim: 8, d_state: 8}}}}
        data: {{blend: {{{corpus / "train"}: 1.0}}, seq_len: 30}}
        train: {{steps: 8, batch_size: 2, dtype: float32, stop_at: 8}}
        optim: {{lr: 0.01, schedule: constant}}
        checkpoint: {{every: 4}}
    """)
    train(parse_config(tree, "test"))
    return folder


def test_a_fork_without_changes_goes_on_to_the_bit(parent, plait, tmp_path):
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    new = tmp_path / "new"
    code, out, _ = plait("fork", f"{parent}@4", new)
    assert code == 0
    assert out.splitlines() == [
        f"forked step 4 of {parent}@4 to {new}",
        "  train.stop_at: 8 -> None",
        f"go on there: plait train {new}/config.yaml",
    ]
    trainer = train(load_config(new / "config.yaml"))
    assert trainer.resumed_from == 4
    assert numbers(new) == numbers(parent)
    facts = newest_of(new).manifest.facts
    assert facts["origin"] == {"fork": {"run": str(parent), "step": 4}}
    said = " ".join(plait("checkpoint", "show", new)[1].split())
    assert f"origin forked from step 4 of {parent}" in said
    assert "schedule after step 0" in said
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before


def test_a_decay_branches_off_a_stable_run(parent, plait, tmp_path):
    new = tmp_path / "decay"
    overrides = ["train.steps=6", "optim.schedule=wsd", "optim.decay_steps=2"]
    code, out, _ = plait("fork", f"{parent}@4", new, *overrides)
    assert code == 0
    assert "  optim.schedule: constant -> wsd\n" in out
    train(load_config(new / "config.yaml"))
    assert [record["lr"] for record in numbers(new)] == [0.01] * 5 + [0.005]
    assert numbers(new)[:5] == [record | {"lr": 0.01} for record in numbers(parent)[:5]]


def test_what_spoils_a_run_is_left_out_in_a_fork(parent, plait, tmp_path):
    new = tmp_path / "skipping"
    assert plait("fork", f"{parent}@4", new, "data.skip=[[10, 12]]")[0] == 0
    train(load_config(new / "config.yaml"))
    ours, theirs = numbers(new), numbers(parent)
    assert ours[:5] == theirs[:5]
    assert ours[5]["loss"] != theirs[5]["loss"]
    state = newest_of(new).manifest.facts
    assert (state["samples"], state["tokens"]) == (18, 8 * 60)


def test_a_pruned_parent_leaves_its_fork_whole(parent, plait, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    new = tmp_path / "new"
    assert plait("fork", copy, new)[0] == 0
    linked = new / "checkpoints" / "step-00000008" / "rank-00000.bin"
    assert linked.stat().st_nlink == 2
    shutil.rmtree(copy)
    newest = newest_of(new)
    assert newest.step == 8
    newest.verify()


def test_where_the_disk_has_no_links_files_are_copied(parent, plait, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    new = tmp_path / "new"
    assert plait("fork", f"{parent}@8", new)[0] == 0
    newest = newest_of(new)
    assert (newest.path / "rank-00000.bin").stat().st_nlink == 1
    newest.verify()


def test_mistakes(parent, plait, tmp_path):
    def line(*words):
        code, _, err = plait("fork", *words)
        assert code == 2
        assert err.count("\n") == 1
        return err.replace(str(parent), "RUN").replace(str(tmp_path), "TMP")

    (tmp_path / "there").mkdir()
    assert line(parent, tmp_path / "there") == (
        "plait: error: TMP/there: is there already; name a new folder, or take it away\n"
    )
    assert line(f"{parent}@5", tmp_path / "new") == (
        "plait: error: RUN: holds no checkpoint of step 5; choose one of 4, 8\n"
    )
    assert line(parent, tmp_path / "new", "train.step=3") == (
        "plait: error: train.step=3: train.step is not a key; did you mean train.steps?\n"
    )
    assert line(f"{parent}@4", tmp_path / "new", "model.d_model=32") == (
        "plait: error: RUN/checkpoints/step-00000004: saved with another model: model.d_model = 16 then "
        "and 32 now; restore those keys, or choose another run.dir\n"
    )
    assert line(f"{parent}@8", tmp_path / "new", "data.skip=[[10, 20]]") == (
        "plait: error: data.skip = [[10, 16]] leaves out samples before 16, which this run has read; go "
        "back to an earlier checkpoint: plait fork RUN@STEP NEW 'data.skip=…'\n"
    )
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_metrics_are_the_parents_up_to_the_fork(parent, plait, tmp_path):
    assert plait("fork", f"{parent}@4", tmp_path / "new")[0] == 0
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [1, 2, 3, 4]
