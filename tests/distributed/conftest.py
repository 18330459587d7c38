"""Ranks that live as long as the session, the one rank they are compared with, and the config of both."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# Programs run in this process and in the ranks' own, and are found by the same names in both.
sys.path.insert(0, str(Path(__file__).parent))

from pool import OneRank, Pools, Tree, change
from saved_runs import SavedRuns


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`Pools`: run a program on the ranks of a layout."""
    pools = Pools(tmp_path_factory.mktemp("ranks"))
    yield pools
    pools.stop()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory) -> OneRank:
    """Run a program on one rank."""
    return OneRank(tmp_path_factory.mktemp("one-rank"))


@pytest.fixture(scope="session")
def saved_runs(ranks, one_rank, tmp_path_factory) -> SavedRuns:
    """Runs with checkpoints, trained once in each layout."""
    return SavedRuns(tmp_path_factory.mktemp("saved"), ranks, one_rank)


@pytest.fixture(scope="session")
def tree(corpus) -> Callable[..., Tree]:
    """A config of all four letters, odd in all its sizes: ``tree({"train.steps": 20}, tp=2)``."""

    def make(changes: dict[str, Any] | None = None, **parallel: Any) -> Tree:
        tree = yaml.safe_load(f"""
            run: {{seed: 3}}
            model:
              pattern: M*-EM
              d_model: 32
              vocab_size: 331
              mamba: {{num_heads: 8, head_dim: 8, d_state: 8, num_groups: 4, chunk_size: 16}}
              attention: {{num_heads: 8, num_kv_heads: 2, head_dim: 8, qk_norm: true, rope_theta: 10000.0}}
              mlp: {{d_ff: 48, activation: swiglu}}
              moe: {{num_experts: 8, top_k: 2, d_expert: 24, d_shared: 16, scaling: 1.5, aux_loss: 0.01,
                     z_loss: 0.001}}
            data: {{blend: {{{corpus / "train"}: 1.0}}, validation: {corpus / "validation"}, seq_len: 250}}
            train: {{steps: 20, batch_size: 5, dtype: float64, z_loss: 0.0001}}
            optim: {{lr: 0.01, warmup_steps: 2}}
            checkpoint: {{every: 2}}
            log: {{tensorboard: false}}
            evaluate: {{batches: 1}}
        """)
        change(tree, changes or {})
        return tree | {"parallel": parallel}

    return make
