"""The layout that is taken where fewer ranks are to be had."""

import pytest

from plait.errors import UserError
from plait.pretrain.config_file import parse_config
from plait.pretrain.fallback_layout import config_for, start_on
from plait.pretrain.trainer import Trainer


@pytest.fixture
def config(tiny):
    tiny["parallel"] = {"dp_shard": 4, "sp": 2}
    tiny["launch"] = {
        "fallback_layouts": [
            {"dp_shard": 2, "sp": 2, "ep": 2},
            {"sp": 2, "micro_batch_size": 1, "activation_checkpointing": True},
        ]
    }
    return parse_config(tiny, "test")


def test_as_many_ranks_as_the_layout_has_take_it(config):
    assert config_for(config, 8) is config


def test_the_first_that_fits_takes_its_place_and_the_batch_stays(config):
    four = config_for(config, 4)
    assert four.parallel.sizes == {"dp_replicate": 1, "dp_shard": 2, "sp": 2, "tp": 1, "ep": 2}
    assert four.train == config.train
    two = config_for(config, 2)
    assert (two.parallel.ranks, two.train.micro_batch_size, two.train.activation_checkpointing) == (
        2,
        1,
        True,
    )
    assert two.train.batch_size == config.train.batch_size


def test_no_other_number_of_ranks_is_started(config):
    line = (
        r"3 ranks were started, but parallel asks for 8 \(dp_shard 4 x sp 2\) and launch.fallback_layouts "
        r"for 4 \(dp_shard 2 x sp 2, ep 2\); 2 \(sp 2\); start as many"
    )
    with pytest.raises(UserError, match=line):
        config_for(config, 3)


NODES = {
    # nodes, room a node: nodes taken, ranks on each, which of the fallback layouts
    "all": (2, 4, (2, 4, None)),
    "one that holds it": (2, 8, (1, 8, None)),
    "one is lost": (1, 4, (1, 4, 0)),
    "three of which two are needed": (3, 2, (2, 2, 0)),
    "as evenly as it goes": (3, 3, (2, 2, 0)),
    "the last": (3, 1, (2, 1, 1)),
}


@pytest.mark.parametrize("case", NODES)
def test_the_machines_that_are_left_decide(case, config):
    nodes, room, (count, ranks, index) = NODES[case]
    start = start_on(config, nodes, room)
    expected = None if index is None else config.launch.fallback_layouts[index]
    assert (start.nodes, start.ranks_a_node, start.fallback) == (count, ranks, expected)


def test_too_few_machines_are_too_few(config):
    with pytest.raises(UserError, match="1 node of 1 does not hold the 8 ranks of parallel"):
        start_on(config, 1, 1)


MISTAKES = {
    "that cannot be": ([{"tp": 3}], r"launch.fallback_layouts.0: parallel.tp = 3 does not divide"),
    "with as many ranks": (
        [{"tp": 4}, {"sp": 2}, {"tp": 2}],
        "launch.fallback_layouts.2 has 2 ranks, as launch.fallback_layouts.1 has, and would never be taken",
    ),
    "with its own ranks": ([{"tp": 2, "dp_shard": 4}], "has 8 ranks, as parallel has"),
    "of no key": ([{"dp": 2}], "launch.fallback_layouts.0.dp is not a key"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_layout_is_refused(mistake, tiny):
    layouts, line = MISTAKES[mistake]
    tiny |= {"parallel": {"dp_shard": 4, "sp": 2}, "launch": {"fallback_layouts": layouts}}
    with pytest.raises(UserError, match=line):
        parse_config(tiny, "test")


def test_the_folder_keeps_what_was_asked_for(tiny):
    tiny |= {"parallel": {"sp": 2}, "launch": {"fallback_layouts": [{}]}}
    asked = parse_config(tiny, "test")
    trainer = Trainer(config_for(asked, 1), written=asked)
    trainer.close()
    assert trainer.folder.config() == asked
