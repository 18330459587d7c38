"""`plait launch torchrun`: the command that each of several machines runs."""

import shlex
from functools import partial
from pathlib import Path

import pytest
import yaml

from plait.pretrain.config_file import load_config


@pytest.fixture
def torchrun(plait, tiny, tmp_path):
    """Print the command for the tiny config with sp 4; returns status, output and errors."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny | {"parallel": {"sp": 4}}))
    return partial(plait, "launch", "torchrun", file)


def test_each_of_two_machines_runs_the_same(torchrun, tmp_path):
    status, out, err = torchrun("--nodes", "2", "--rendezvous", "node1", "train.steps=7")
    assert (status, err) == (0, f"# on each of the 2 machines, in {Path.cwd()}:\n")
    words = shlex.split(out)
    assert words[:2] == ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    options = dict(zip(words[5:-4:2], words[6:-4:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "run",
        "--rdzv-endpoint": "node1:29500",
        "--nproc-per-node": "2",
        "--max-restarts": "100",
    }
    frozen = tmp_path / "run" / "launch" / "config.yaml"
    assert words[-4:] == ["-m", "plait.launch", "train", str(frozen)]
    assert load_config(frozen).train.steps == 7


def test_one_machine_needs_no_place_to_meet(torchrun):
    status, out, _ = torchrun()
    assert status == 0
    assert "--standalone --nproc-per-node 4 " in out


MISTAKES = {
    "no place to meet": (["--nodes", "2"], "--rendezvous is not set; name the first of the machines"),
    "machines that hold no layout": (
        ["--nodes", "2", "--gpus-per-node", "1", "--rendezvous", "a"],
        "2 nodes of 1 do not hold the 4 ranks of parallel (sp 4)",
    ),
    "shards that are not there": (["data.blend={x: 1.0}"], "x.bin: no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_freezes_nothing(mistake, torchrun, tmp_path):
    words, line = MISTAKES[mistake]
    status, out, err = torchrun(*words)
    assert (status, out) == (2, "")
    assert err.startswith(f"plait: error: {line}")
    assert not (tmp_path / "run" / "launch").exists()
