"""Drawn layouts, patterns, lengths and documents: whatever the rules allow agrees with one rank."""

import copy
import itertools
import math

import hypothesis.strategies as st
import pytest
from agreement import assert_same_gradients
from hypothesis import HealthCheck, assume, given, settings
from layouts import EXCHANGES

from plait.parallel.axes import AXES
from plait.pretrain.config_file import parse_config

TOLERANCE = 1e-10

FEW, MANY = 4, 2000


@st.composite
def layouts(draw, ranks):
    """All ways to divide a number of ranks over the axes."""
    sizes = dict.fromkeys(AXES, 1)
    left = ranks
    for factor in (2, 2, 2) if ranks in (2, 4, 8) else (3,):
        if left % factor == 0 and left > 1:
            sizes[draw(st.sampled_from(AXES))] *= factor
            left //= factor
    replica = ranks // sizes["dp_replicate"]
    return sizes | {
        "ep": draw(st.sampled_from([n for n in range(1, replica + 1) if replica % n == 0])),
        "keep_dispatched": draw(st.booleans()),
        "state_exchange": draw(st.sampled_from((*EXCHANGES, "auto"))),
        "fold_queries": draw(st.booleans()),
    }


@st.composite
def documents(draw, length):
    """Lengths that add up to a row's."""
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=6))
    places = [0, *sorted(cuts), length]
    return [end - first for first, end in itertools.pairwise(places)]


@st.composite
def cases(draw, numbers):
    ranks = draw(st.sampled_from(numbers))
    length, rows = draw(st.integers(2, 70)), draw(st.integers(1, 5))
    heads = draw(st.sampled_from((4, 8)))
    groups, experts = draw(st.sampled_from(((1, 2), (1, 3), (1, 4), (1, 5), (2, 6), (2, 8), (4, 8))))
    changes = {
        "model.pattern": draw(st.text("M*-E", min_size=1, max_size=3)),
        "model.d_model": draw(st.sampled_from((8, 12))),
        "model.vocab_size": draw(st.integers(7, 40)),
        "model.tie_embeddings": draw(st.booleans()),
        "model.mamba.num_heads": heads,
        "model.mamba.head_dim": draw(st.integers(1, 5)),
        "model.mamba.d_state": draw(st.integers(1, 5)),
        "model.mamba.num_groups": draw(st.sampled_from((1, 2, 4))),
        "model.mamba.d_conv": draw(st.integers(2, 5)),
        "model.mamba.chunk_size": draw(st.integers(1, 20)),
        "model.attention.num_heads": heads,
        "model.attention.num_kv_heads": draw(st.sampled_from((1, 2, 4))),
        "model.attention.head_dim": 4,
        "model.attention.qk_norm": draw(st.booleans()),
        "model.moe.num_experts": experts,
        "model.moe.num_groups": groups,
        "model.moe.top_k_groups": draw(st.integers(1, groups)),
        "model.moe.top_k": draw(st.integers(1, experts)),
        "model.moe.d_shared": draw(st.sampled_from((0, 8))),
        "data.seq_len": length,
        "data.isolate_documents": draw(st.booleans()),
        "train.batch_size": rows,
        "train.micro_batch_size": draw(st.sampled_from((None, 1, rows))),
        "train.activation_checkpointing": draw(st.booleans()),
    }
    return {
        "changes": changes,
        "layout": draw(layouts(ranks)),
        "documents": [draw(documents(length)) for _ in range(rows)],
        "masked": draw(st.sampled_from((0.0, 0.3, 0.9))),
    }


def check(ranks, one_rank, tree, case):
    config = tree(case["changes"], **case["layout"])
    config["run"]["dir"] = "unused"
    try:
        parse_config(copy.deepcopy(config), "test")
    except Exception:
        # The rules forbid it, and tests/pretrain/test_layout.py says so.
        assume(False)
    options = {"documents": case["documents"], "masked": case["masked"]}
    number = math.prod(case["layout"][axis] for axis in AXES)
    found = ranks.run("drawn", number, keep_groups=True, tree=config, **options)
    assert_same_gradients(found, one_rank("drawn", config, **options), TOLERANCE)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@given(case=cases(numbers=(2, 4)))
@settings(max_examples=FEW, derandomize=True, **COMMON)
def test_a_few(ranks, one_rank, tree, case):
    check(ranks, one_rank, tree, case)


@pytest.mark.long
@given(case=cases(numbers=(2, 3, 4, 8)))
@settings(max_examples=MANY, **COMMON)
def test_thousands(ranks, one_rank, tree, case):
    check(ranks, one_rank, tree, case)
