"""Saved on one rank and loaded on two, saved on two and loaded on one and on two cut otherwise."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from plait.pretrain.checkpoint import Checkpoints

SCRIPT = Path(__file__).with_name("ranks.py")


def run_ranks(folder: Path, world_size: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error::UserWarning",
                str(SCRIPT),
                str(folder),
                str(rank),
                str(world_size),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(outputs)


def test_layouts_load_each_other(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    Checkpoints(tmp_path / "one").save(1, script.whole_tensors(), {})
    run_ranks(tmp_path, 2)

    checkpoint = Checkpoints(tmp_path / "many").newest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.manifest.facts) == (2, {"step": 2})
    assert sorted(checkpoint.manifest.files) == ["metadata.json", "rank-00000.bin", "rank-00001.bin"]
    checkpoint.verify()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in script.whole_tensors().items()}
    checkpoint.load_into(tensors)
    script.assert_whole(tensors)

    # A replica is written once, and both ranks write.
    stored = sum(chunk.length for tensor in checkpoint.tensors.values() for chunk in tensor.chunks)
    assert stored == sum(tensor.nbytes for tensor in tensors.values())
    files = {chunk.file for tensor in checkpoint.tensors.values() for chunk in tensor.chunks}
    assert len(files) == 2
