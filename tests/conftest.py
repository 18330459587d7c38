"""Every test runs with uninitialised memory poisoned: `torch.empty` holds NaN."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from xdist.scheduler import LoadScopeScheduling

# Beside another worker a second thread only costs.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

ONE_WORKER = ("distributed", "slurm")
"""Folders whose tests share ranks or a cluster, and so go to one worker; first, because they take longest."""


def _group(file: Path) -> str:
    """What goes to one worker together, of a file below the repository's root."""
    return file.parts[1] if file.parts[1] in ONE_WORKER else str(file)


class _ByFile(LoadScopeScheduling):
    """A worker takes all tests of a file, or of a folder of `ONE_WORKER`: what they share is made once."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(Path(nodeid.partition("::")[0]))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits at the end for another's."""
    order = {name: place for place, name in enumerate((*ONE_WORKER, "launch", "pretrain"))}
    items.sort(key=lambda item: order.get(item.path.relative_to(config.rootpath).parts[1], len(order)))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all(), "torch fills what is uninitialised under deterministic algorithms"
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For models so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plait(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line, in this process; returns the exit status, standard output and standard error."""
    from plait.launch.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code or 0
        assert isinstance(code, int), code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A corpus of sixty short documents, with a tokenizer of 320 ids."""
    from plait.data.build import build
    from plait.data.tokenizer import train_tokenizer

    draw = random.Random(0)
    words = ["state", "space", "chunk", "token", "expert", "router", "decay", "scan", "head", "gate"]
    texts = [" ".join(draw.choice(words) for _ in range(draw.randrange(5, 120))) + "\n" for _ in range(60)]
    folder = tmp_path_factory.mktemp("corpora")
    tokenizer = train_tokenizer(texts, folder / "tiny.model", vocab_size=320)
    build(folder / "tiny", texts, tokenizer, validation=6)
    return folder / "tiny"


@pytest.fixture
def tiny(corpus, tmp_path) -> dict:
    """A config of all four letters that trains in milliseconds, as the tree that YAML gives."""
    return yaml.safe_load(f"""
        run: {{dir: {tmp_path / "run"}, seed: 3}}
        model:
          pattern: M*-E
          d_model: 32
          vocab_size: 320
          mamba: {{num_heads: 4, head_dim: 16, d_state: 8, num_groups: 2, chunk_size: 16}}
          attention: {{num_heads: 4, num_kv_heads: 2, head_dim: 8}}
          mlp: {{d_ff: 48}}
          moe: {{num_experts: 4, top_k: 2, d_expert: 24, d_shared: 16, scaling: 1.5}}
        data: {{blend: {{{corpus / "train"}: 1.0}}, validation: {corpus / "validation"}, seq_len: 50}}
        train: {{steps: 12, batch_size: 4, dtype: float32}}
        optim: {{lr: 0.01, warmup_steps: 2}}
        checkpoint: {{every: 4, keep: 2}}
        log: {{every: 4, tensorboard: false}}
        evaluate: {{every: 6, batches: 2}}
    """)


def pytest_terminal_summary(terminalreporter) -> None:
    """Say aloud what a lack of other programs has left untested."""
    skipped = {report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reason for reason in skipped if "was tested here" in reason):
        terminalreporter.write_line(f"NOT TESTED: {reason.removeprefix('Skipped: ')}", yellow=True, bold=True)
