"""A run: resumed to the bit, interrupted at any moment, whatever the micro-batch."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from plait.errors import UserError
from plait.pretrain.callbacks import Checkpointing, Evaluation, MetricsFile, TensorBoard
from plait.pretrain.config_file import parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.optimizer import build_optimizer, learning_rate
from plait.pretrain.trainer import Trainer

CHANGING = ("tokens_per_second", "step_seconds", "data_seconds", "mfu")


def train(tree, **changes):
    for key, value in changes.items():
        section, _, name = key.partition("_")
        tree[section][name] = value
    trainer = Trainer(parse_config(tree, "test"), [Evaluation(), MetricsFile(), Checkpointing()])
    trainer.run()
    return trainer


def numbers(trainer):
    """The run's metrics without what a clock decides."""
    return [
        {key: value for key, value in record.items() if key not in CHANGING}
        for record in read_metrics(trainer.folder.metrics_file)
    ]


def test_two_halves_are_the_whole(tiny, tmp_path):
    whole = train(tiny, run_dir=str(tmp_path / "whole"))
    first = train(tiny, run_dir=str(tmp_path / "halves"), train_stop_at=6)
    assert first.state.step == 6
    second = train(tiny, run_dir=str(tmp_path / "halves"), train_stop_at=None)
    assert second.resumed_from == 6
    assert numbers(second) == numbers(whole)
    assert [record["step"] for record in numbers(whole)] == list(range(1, 13))


def test_a_finished_run_stays_finished(tiny):
    train(tiny)
    again = train(tiny)
    assert again.state.step == 12
    assert len(again.folder.metrics_file.read_text().splitlines()) == 12


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_micro_batches_are_the_batch(tiny, tmp_path, dtype):
    tiny["model"]["pattern"] = "M*-"
    tiny["train"] |= {"dtype": dtype, "steps": 4}
    losses = []
    for micro in (4, 2, 1):
        run = train(tiny, run_dir=str(tmp_path / f"{micro}"), train_micro_batch_size=micro)
        losses.append([r["loss"] for r in numbers(run)])
    tolerance = 1e-12 if dtype == "float64" else 2e-3
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[2] == pytest.approx(losses[0], rel=tolerance)


def test_the_loss_falls(tiny):
    tiny["train"]["steps"] = 40
    records = numbers(train(tiny))
    assert records[0]["loss"] == pytest.approx(5.77, rel=0.01)
    assert records[-1]["loss"] < 4.0
    assert records[-1]["validation_loss"] < 4.2
    assert len(records[-1]["max_violation"]) == 1
    assert len(records[-1]["dead_experts"]) == 1
    assert 0 < records[-1]["router_entropy"][0] < math.log(4)
    assert len(records[-1]["state_norm"]) == 1


@pytest.mark.long
def test_a_run_killed_at_any_moment_goes_on_to_the_bit(tiny, tmp_path):
    whole = train(tiny, run_dir=str(tmp_path / "whole"), train_steps=40, checkpoint_every=2)
    tiny["run"]["dir"] = str(tmp_path / "killed")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    command = [sys.executable, "-m", "plait.launch", "train", str(file)]
    draw = random.Random()
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment())
    while process.poll() is None and not metrics.exists():
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    records = read_metrics(metrics)
    killed = [{k: v for k, v in r.items() if k not in CHANGING} for r in records]
    assert killed == numbers(whole)


def _environment():
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONWARNINGS": "ignore"}


def test_changes_are_announced_and_other_models_refused(tiny, caplog):
    train(tiny, train_stop_at=4)
    again = train(tiny, optim_lr=0.02, train_stop_at=6, train_micro_batch_size=2)
    assert again.resumed_from == 4
    assert "optim.lr was 0.01 in the checkpoint and is 0.02 now" in caplog.text
    assert "micro_batch_size" not in caplog.text
    tiny["model"]["mlp"]["d_ff"] = 64
    with pytest.raises(UserError, match=r"another model: model.mlp.d_ff = 48 then and 64 now"):
        train(tiny)


def test_a_longer_window_goes_on_with_unread_tokens(tiny):
    train(tiny, train_stop_at=4)
    again = train(tiny, data_seq_len=80, train_stop_at=6)
    stages = again.state.plan.stages
    assert [stage.first_sample for stage in stages] == [0, 16]
    assert stages[1].seq_len == 80
    assert stages[1].sources[0].token > 0


def test_tensorboard_holds_scalars_config_loads_and_a_sample(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(parse_config(tiny, "test"), [Evaluation(), TensorBoard()])
    trainer.run()
    events = EventAccumulator(str(trainer.folder.tensorboard))
    events.Reload()
    tags = events.Tags()
    assert {"loss/training", "loss/validation", "optimizer/lr", "speed/mfu", "max_violation/layer_03"} <= set(
        tags["scalars"]
    )
    assert {"dead_experts/layer_03", "router_entropy/layer_03"} <= set(tags["scalars"])
    assert {"config/text_summary", "sample/text_summary"} <= set(tags["tensors"])
    assert [event.step for event in events.Images("experts/load")] == [6, 12]
    assert [event.step for event in events.Scalars("loss/training")] == [4, 6, 8, 12]


def test_only_matrices_decay(tiny):
    from plait.pretrain.model import build_model

    config = parse_config(tiny, "test")
    model = build_model(config.model, seed=0)
    decay, still = build_optimizer(model, config.optim).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.1
    assert still["weight_decay"] == 0
    ends = {names[id(p)].rsplit(".", 1)[-1] for p in still["params"]}
    assert ends == {"weight", "bias", "A_log", "D", "dt_bias"}
    assert all(p.ndim == 1 for p in still["params"])
    assert "layers.0.mixer.x_conv.weight" in {names[id(p)] for p in decay["params"]}


def test_learning_rates(tiny):
    tiny["train"]["steps"] = 10
    tiny["optim"] |= {"min_lr": 0.001, "warmup_steps": 2, "decay_steps": 4}

    def rates(schedule):
        tiny["optim"]["schedule"] = schedule
        config = parse_config(tiny, "test")
        return [learning_rate(step, config.optim, config.train.steps) for step in range(1, 11)]

    assert rates("constant") == [0.005] + [0.01] * 9
    wsd = rates("wsd")
    assert wsd[:7] == pytest.approx([0.005] + [0.01] * 6)
    assert wsd[7:] == pytest.approx([0.00775, 0.0055, 0.00325])
    cosine = rates("cosine")
    assert cosine[1:3] == pytest.approx([0.01, 0.01])
    assert cosine[6] == pytest.approx(0.0055)
    assert sorted(cosine[1:], reverse=True) == cosine[1:]


def test_metrics_are_one_json_object_a_step_in_full_precision(tiny):
    trainer = train(tiny)
    records = [json.loads(line) for line in trainer.folder.metrics_file.read_text().splitlines()]
    assert all(isinstance(record["loss"], float) for record in records)
    assert records[5]["validation_loss"] > 0
    assert {"step", "loss", "grad_norm", "lr", "tokens", *CHANGING} <= set(records[0])
    assert records[-1]["tokens"] == 12 * 4 * 50
