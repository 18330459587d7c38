"""Layouts that a model cannot have die with the rule they break, and with layouts that it can have."""

import re

import pytest

from plait.parallel.axes import AXES, describe_layout, num_ranks
from plait.pretrain.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig
from plait.pretrain.config_file import parse_config
from plait.pretrain.layout import check_layout, layout_faults

RUN = {"seq_len": 250, "batch_size": 6}


def model(**sizes) -> ModelConfig:
    """Of all letters, with everything divisible by 8 but what is given."""
    defaults = {
        "heads": 16,
        "groups": 8,
        "d_conv": 4,
        "queries": 16,
        "keys": 8,
        "d_ff": 48,
        "d_shared": 16,
        "vocabulary": 331,
        "pattern": "M*-E",
    }
    s = defaults | sizes
    return ModelConfig(
        pattern=s["pattern"],
        d_model=32,
        vocab_size=s["vocabulary"],
        mamba=MambaConfig(
            num_heads=s["heads"], head_dim=8, d_state=8, num_groups=s["groups"], d_conv=s["d_conv"]
        ),
        attention=AttentionConfig(num_heads=s["queries"], num_kv_heads=s["keys"], head_dim=8),
        mlp=MLPConfig(d_ff=s["d_ff"]),
        moe=MoEConfig(num_experts=3, top_k=2, d_expert=7, d_shared=s["d_shared"]),
    )


def layout(**sizes) -> dict[str, int]:
    return dict.fromkeys((*AXES, "ep"), 1) | sizes


FAULTS = [
    ({"heads": 18, "groups": 2}, {"tp": 4}, "parallel.tp = 4 does not divide model.mamba.num_heads = 18"),
    (
        {"queries": 18, "keys": 2},
        {"tp": 4},
        "parallel.tp = 4 does not divide model.attention.num_heads = 18",
    ),
    ({"d_ff": 50}, {"tp": 4}, "parallel.tp = 4 does not divide model.mlp.d_ff = 50"),
    ({"d_shared": 18}, {"tp": 4}, "parallel.tp = 4 does not divide model.moe.d_shared = 18"),
    (
        {"heads": 24, "groups": 6},
        {"tp": 4},
        "parallel.tp = 4 neither divides nor is a multiple of model.mamba.num_groups = 6",
    ),
    (
        {"queries": 24, "keys": 6},
        {"tp": 4},
        "parallel.tp = 4 neither divides nor is a multiple of model.attention.num_kv_heads = 6",
    ),
    (
        {"vocabulary": 9},
        {"tp": 8},
        "parallel.tp = 8 leaves a rank without a row of model.vocab_size = 9",
    ),
    (
        {"d_conv": 8},
        {"sp": 50},
        "parallel.sp = 50 cuts data.seq_len = 250 into shards of 5 tokens, shorter than the 7 that the "
        "convolution looks back",
    ),
    ({}, {"sp": 35}, "parallel.sp = 35 leaves a rank without a token of data.seq_len = 250"),
    (
        {},
        {"dp_replicate": 2, "dp_shard": 4},
        "parallel.dp_replicate x dp_shard = 8 leaves a rank without a sequence of train.batch_size = 6",
    ),
    ({}, {"tp": 2, "ep": 2}, "parallel.ep = 2 does not divide model.moe.num_experts = 3"),
    (
        {},
        {"dp_replicate": 3, "dp_shard": 2, "ep": 3},
        "parallel.ep = 3 does not divide dp_shard x sp x tp = 2",
    ),
    (
        {"pattern": "M*-"},
        {"dp_shard": 3, "ep": 3},
        "parallel.ep = 3 but model.pattern = 'M*-' has no experts",
    ),
]


@pytest.mark.parametrize(("sizes", "asked", "fault"), FAULTS)
def test_each_rule_is_named(sizes, asked, fault):
    assert list(layout_faults(model(**sizes), layout(**asked), **RUN)) == [fault]
    with pytest.raises(ValueError) as error:
        check_layout(model(**sizes), layout(**asked), **RUN)
    assert str(error.value).startswith(f"{fault}; ")


@pytest.mark.parametrize(("sizes", "asked", "fault"), FAULTS)
def test_the_layouts_that_it_names_work(sizes, asked, fault):
    with pytest.raises(ValueError) as error:
        check_layout(model(**sizes), layout(**asked), **RUN)
    ranks = num_ranks(layout(**asked))
    _, _, remedy = str(error.value).partition("; ")
    if remedy.startswith("no layout"):
        assert remedy == f"no layout of {ranks} ranks works; start fewer"
        return
    shown = remedy.removeprefix(f"layouts of {ranks} ranks that work: ").split("; or ")
    assert 1 <= len(shown) <= 3
    for text in shown:
        proposed = layout(**{axis: int(size) for axis, size in re.findall(r"(\w+) (\d+)", text)})
        assert num_ranks(proposed) == ranks
        assert describe_layout(proposed) == text
        check_layout(model(**sizes), proposed, **RUN)


def test_the_nearest_comes_first():
    with pytest.raises(ValueError) as error:
        check_layout(model(heads=18, groups=2), layout(dp_shard=2, tp=4), **RUN)
    first = str(error.value).partition("that work: ")[2].split("; or ")[0]
    assert first in {"dp_shard 4 x tp 2", "dp_shard 2 x sp 2 x tp 2", "dp_replicate 2 x dp_shard 2 x tp 2"}


def test_a_huge_number_is_answered_at_once():
    with pytest.raises(ValueError, match="no layout of 1152921504606846976 ranks works; start fewer"):
        check_layout(model(), layout(tp=2**60), **RUN)


def test_no_layout_at_all():
    with pytest.raises(ValueError, match=r"; no layout of 7 ranks works; start fewer"):
        check_layout(model(), layout(tp=7), seq_len=13, batch_size=2)


@pytest.mark.parametrize(
    "asked",
    [
        {"tp": 8},
        {"tp": 16, "sp": 3},
        {"sp": 8},
        {"sp": 36},
        {"dp_replicate": 2, "dp_shard": 3, "sp": 7, "tp": 4},
    ],
)
def test_what_divides_nothing_evenly_may_work(asked):
    """Lengths, batches and vocabularies need not divide; tp 16 shares each of 8 groups and key heads."""
    check_layout(model(), layout(**asked), **RUN)


def test_letters_that_are_not_there_ask_for_nothing():
    odd = model(pattern="M", d_ff=49, d_shared=15, queries=15, keys=5)
    check_layout(odd, layout(tp=8), **RUN)


def test_without_a_convolution_a_shard_of_one_token_works():
    short = model(pattern="*")
    check_layout(short, layout(sp=50), seq_len=50, batch_size=1)
    with pytest.raises(ValueError, match="shards of 1 tokens, shorter than the 3"):
        check_layout(model(), layout(sp=50), seq_len=50, batch_size=1)


def test_a_config_refuses_such_a_layout(tiny):
    tiny["parallel"] = {"tp": 8}
    with pytest.raises(
        Exception, match=r"parallel.tp = 8 does not divide model.mamba.num_heads = 4; layouts of 8"
    ):
        parse_config(tiny, "test")
