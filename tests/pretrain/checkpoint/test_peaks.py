"""Loading streams: the peak is at most the largest tensor above what stands at the end."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.checkpoint.files import checksum
from plait.pretrain.checkpoint.index import Chunk, StoredTensor, format_index
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

SCRIPT = Path(__file__).with_name("peaks.py")
SLACK = 12 << 20
"""Bytes that libraries take for the time being: buffers of reading threads, imports, what malloc keeps."""


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 22 million parameters with a checkpoint, whose largest tensor has 16 MB."""
    tree = yaml.safe_load(f"""
        run: {{dir: {tmp_path_factory.mktemp("peaks") / "run"}}}
        model:
          pattern: "[-M]x3"
          d_model: 512
          vocab_size: 8192
          mamba: {{num_heads: 16, head_dim: 64, d_state: 16, num_groups: 1, chunk_size: 16}}
          mlp: {{d_ff: 4096}}
        data: {{blend: {{{corpus / "train"}: 1.0}}, seq_len: 50}}
        train: {{steps: 4, batch_size: 1, dtype: float32}}
        optim: {{lr: 0.01, warmup_steps: 2}}
    """)
    trainer = Trainer(parse_config(tree, "test"))
    Checkpoints(trainer.folder.checkpoints).save(
        0, trainer.state.tensors(), trainer.state.facts(trainer.config)
    )
    trainer.close()
    return trainer.folder.path


def sizes(run: Path) -> dict[str, int]:
    (checkpoint,) = Checkpoints(run / "checkpoints").all()
    return {name: math.prod(t.shape) * t.dtype.itemsize for name, t in checkpoint.tensors.items()}


def recut(run: Path) -> None:
    """The checkpoint as two ranks of tp would have written it."""
    (checkpoint,) = Checkpoints(run / "checkpoints").all()
    files = [checkpoint.path / f"new-{rank}" for rank in (0, 1)]
    index = {}
    streams = [file.open("wb") for file in files]
    for name, stored in checkpoint.tensors.items():
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        checkpoint.load_into({name: tensor}, partial=True)
        dim = 1 if name.endswith(("out_proj.weight", "down_proj.weight")) else 0
        parts = tensor.chunk(2, dim) if tensor.dim() else (tensor,)
        chunks, offset = [], 0
        for rank, part in enumerate(parts):
            streams[rank].write(bytes(-streams[rank].tell() % 64))
            place = streams[rank].tell()
            data = part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            streams[rank].write(data)
            offsets = tuple(offset if d == dim else 0 for d in range(tensor.dim()))
            offset += part.shape[dim] if part.dim() else 0
            chunks.append(Chunk(offsets, tuple(part.shape), f"rank-{rank:05d}.bin", place, len(data)))
        index[name] = StoredTensor(stored.shape, stored.dtype, tuple(chunks))
    for rank, (stream, file) in enumerate(zip(streams, files, strict=True)):
        stream.close()
        os.replace(file, checkpoint.path / f"rank-{rank:05d}.bin")
    (checkpoint.path / "metadata.json").write_text(format_index(index))
    path = checkpoint.path / "manifest.json"
    body = json.loads(path.read_text())
    body.pop("sha256")
    names = ["metadata.json", "rank-00000.bin", "rank-00001.bin"]
    body["files"] = {
        name: {"size": (checkpoint.path / name).stat().st_size, "sha256": checksum(checkpoint.path / name)}
        for name in names
    }
    from plait.pretrain.checkpoint.manifest import _checksum

    path.write_text(json.dumps(body | {"sha256": _checksum(body)}))


def peaks(*jobs: tuple[str, ...]) -> list[tuple[int, int]]:
    """Of each load the peak above its end, and its end above its beginning; bytes."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(jobs)],
        capture_output=True,
        text=True,
        # What is freed goes back to the system, so that what stands is what is held.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return [tuple(pair) for pair in json.loads(ran.stdout.splitlines()[-1])]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to forget a peak")
@pytest.mark.long
def test_the_peak_of_loading(run: Path, tmp_path: Path) -> None:
    size = sizes(run)
    largest, model = max(size.values()), sum(n for name, n in size.items() if name.startswith("model."))
    assert largest < model / 4
    tree = yaml.safe_load((run / "config.yaml").read_text())
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    recut(cut)
    configs = {}
    for name, folder, begin in (("same", run, None), ("new", tmp_path / "new", str(run)), ("cut", cut, None)):
        configs[name] = str(tmp_path / f"{name}.yaml")
        changed = tree | {"run": {"dir": str(folder)}, "checkpoint": {"init_from": begin}}
        Path(configs[name]).write_text(yaml.safe_dump(changed))
    jobs = {
        "loaded": ("load", str(run), "float32"),
        "resumed": ("train", configs["same"]),
        "resumed from two ranks": ("train", configs["cut"]),
        "begun with its weights": ("train", configs["new"]),
        "loaded in half": ("load", str(run), "bfloat16"),
        "loaded from two ranks": ("load", str(cut), "float32"),
    }
    found = dict(zip(jobs, peaks(*jobs.values()), strict=True))
    for name, (above, held) in found.items():
        print(f"{name}: {above / 1e6:.0f} MB above {held / 1e6:.0f}; largest {largest / 1e6:.0f}")
        least = sum(size.values()) if "resumed" in name else model // (2 if "half" in name else 1)
        assert held > 0.8 * least, name
        assert above <= largest + SLACK, name
