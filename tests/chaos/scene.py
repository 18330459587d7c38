"""A small run of two ranks for others to disturb: its corpus, its command, what is seen of it."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from plait.data.build import build
from plait.data.tokenizer import train_tokenizer
from plait.pretrain.checkpoint import Checkpoint
from plait.pretrain.checkpoint.catalogue import whole_checkpoints

__all__ = ["EVERY", "Scene", "make_config"]

HOOK = Path(__file__).with_name("hook")

EVERY = 4
"""Steps between checkpoints."""

PATIENCE = 300.0
"""Seconds after which the program gives up; each wait below takes a few on an idle machine."""

WORDS = ["state", "space", "chunk", "token", "expert", "router", "decay", "scan", "head", "gate"]


def make_config(folder: Path) -> Path:
    """A corpus of sixty documents, and the config of a run of two ranks on it that would never end."""
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(5, 120))) + "\n" for _ in range(60)]
    tokenizer = train_tokenizer(texts, folder / "tiny.model", vocab_size=320)
    build(folder / "tiny", texts, tokenizer, validation=6)
    config = yaml.safe_load(f"""
        run: {{dir: {folder / "run"}, seed: 3}}
        model:
          pattern: M*-E
          d_model: 32
          vocab_size: 320
          mamba: {{num_heads: 4, head_dim: 16, d_state: 8, num_groups: 2, chunk_size: 16}}
          attention: {{num_heads: 4, num_kv_heads: 2, head_dim: 8}}
          mlp: {{d_ff: 48}}
          moe: {{num_experts: 4, top_k: 2, d_expert: 24, d_shared: 16, scaling: 1.5}}
        data:
          blend: {{{folder / "tiny" / "train"}: 1.0}}
          validation: {folder / "tiny" / "validation"}
          seq_len: 50
        train: {{steps: 1000000, batch_size: 4, dtype: float32}}
        optim: {{lr: 0.01, warmup_steps: 2, schedule: constant}}
        parallel: {{sp: 2, ep: 2}}
        checkpoint: {{every: {EVERY}, keep: 3}}
        log: {{every: {EVERY}, tensorboard: false}}
        evaluate: {{every: 6, batches: 2}}
    """)
    file = folder / "config.yaml"
    file.write_text(yaml.dump(config))
    return file


class Scene:
    """A run, its launcher and its ranks.

    Args:
        torchrun: starts it in the place of `plait launch local`.
    """

    def __init__(self, folder: Path, config: Path, run: Path, torchrun: bool = False) -> None:
        self.folder, self.config, self.run, self.torchrun = folder, config, run, torchrun
        (folder / "ranks").mkdir(parents=True)
        self.launcher: subprocess.Popen[bytes] | None = None

    def start(self, *overrides: str) -> None:
        local = [sys.executable, "-m", "plait.launch", "launch", "local"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        torchrun += ["--max-restarts", "1000", "--monitor-interval", "0.1", "-m", "plait.launch", "train"]
        path = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
        threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with (self.folder / "output").open("ab") as output:
            self.launcher = subprocess.Popen(
                [
                    *(torchrun if self.torchrun else local),
                    str(self.config),
                    f"run.dir={self.run}",
                    *overrides,
                ],
                stdout=output,
                stderr=output,
                env=os.environ | threads | {"PYTHONPATH": path, "PLAIT_CHAOS": str(self.folder)},
            )

    def wait_until(self, what: Callable[[], object], *, alive: bool = True) -> None:
        """
        Args:
            alive: the launcher must not end meanwhile.

        Raises:
            RuntimeError: it ended, or too long was waited; with the end of what was printed.
        """
        deadline = time.monotonic() + PATIENCE
        while not what():
            ended = alive and self.launcher is not None and self.launcher.poll() is not None
            if ended or time.monotonic() > deadline:
                said = (self.folder / "output").read_text(errors="replace")
                raise RuntimeError(
                    f"{'the launcher ended' if ended else 'nothing happened'}:\n{said[-3000:]}"
                )
            time.sleep(0.01)

    def wait_for_end(self) -> int:
        """The launcher's status."""
        assert self.launcher is not None
        status = self.launcher.wait(PATIENCE)
        self.launcher = None
        self.wait_until(lambda: not self.processes(), alive=False)
        return status

    def processes(self) -> list[int]:
        """The ranks that live."""
        return [pid for file in (self.folder / "ranks").iterdir() if self.lives(pid := int(file.name))]

    def lives(self, pid: int) -> bool:
        """Whether a process of this scene lives; another may bear its number by now."""
        try:
            process = psutil.Process(pid)
            there = process.status() != psutil.STATUS_ZOMBIE
            return there and process.environ().get("PLAIT_CHAOS") == str(self.folder)
        except psutil.Error:
            return False

    def leftovers(self) -> list[int]:
        """Whatever process was started in this scene and is there."""
        return [pid for pid in psutil.pids() if self.lives(pid)]

    def steps(self) -> list[int]:
        """Steps in the order in which they were recorded, those that were done again too."""
        file = self.run / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]

    def starts(self) -> list[int]:
        """The steps that the run was taken up at, by its log."""
        file = self.run / "run.log"
        text = file.read_text() if file.exists() else ""
        return [int(step) for step in re.findall(r"  started: .*; steps (\d+) to ", text)]

    def checkpoints(self) -> list[Checkpoint]:
        """Those that are whole by their sizes, the newest last."""
        return whole_checkpoints(self.run / "checkpoints", lambda _: None)
