"""Config files: read, overridden, shown, and refused in one line."""

import contextlib
from collections import Counter

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import UserError
from plait.pretrain.config import ModelConfig
from plait.pretrain.config_file import SHIPPED, config_keys, dump_config, load_config, parse_config
from plait.pretrain.model import Hybrid
from plait.pretrain.pattern import expand


def test_shown_config_reads_back_to_the_same(tiny, tmp_path):
    config = parse_config(tiny, "test")
    shown = tmp_path / "shown.yaml"
    shown.write_text(dump_config(config))
    assert load_config(shown) == config
    assert ".inf" in shown.read_text()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).model.layers


def test_overrides_are_yaml_and_the_last_wins(tiny, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    config = load_config(file, ["optim.lr=1e-4", "optim.clip=null", "train.steps=20", "train.steps=30"])
    assert (config.optim.lr, config.optim.clip, config.train.steps) == (1e-4, None, 30)


def test_an_included_file_lies_under_what_includes_it(tiny, tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.dump({"model": tiny.pop("model"), "train": {"steps": 7}}))
    (tmp_path / "run.yaml").write_text(yaml.dump({"include": "model.yaml", **tiny}))
    config = load_config(tmp_path / "run.yaml")
    assert config.model.d_model == 32
    assert config.train.steps == 12


def test_keys_are_those_that_are_promised():
    keys = set(config_keys())
    for key in (
        "model.mamba.dt_limit",
        "model.attention.rope_theta",
        "model.moe.score_bias",
        "train.stop_at",
        "optim.decay_steps",
        "parallel.state_exchange",
        "checkpoint.async",
        "evaluate.batches",
    ):
        assert key in keys


@pytest.mark.parametrize(
    ("pattern", "layers"), [("M*-E", "M*-E"), ("[ME]x3*", "MEMEME*"), ("M[[ME]x2*]x2", "MMEME*MEME*")]
)
def test_patterns_expand(pattern, layers):
    assert expand(pattern) == layers


@given(st.text(alphabet="M*-E[]x0123456789 Q", max_size=40))
def test_no_pattern_is_a_traceback_or_a_hang(pattern):
    with contextlib.suppress(ValueError):
        assert set(expand(pattern)) <= set("M*-E")


@given(
    st.dictionaries(
        st.sampled_from([key for key in config_keys() if "." in key]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([1, 2, 3]),
        min_size=1,
        max_size=3,
    )
)
def test_no_value_is_a_traceback(values):
    tree = yaml.safe_load((SHIPPED / "demo.yaml").read_text())
    for key, value in values.items():
        *sections, leaf = key.split(".")
        below = tree
        for section in sections:
            if not isinstance(below.get(section), dict):
                below[section] = {}
            below = below[section]
        below[leaf] = value
    with contextlib.suppress(UserError):
        parse_config(tree, "test")


@pytest.mark.parametrize(
    ("name", "layers", "billions"),
    [("nemotron-h-8b", {"M": 24, "-": 24, "*": 4}, 8.10)],
)
def test_architectures_have_the_published_size(name, layers, billions):
    tree = yaml.safe_load((SHIPPED / "models" / f"{name}.yaml").read_text())
    config = ModelConfig.model_validate(tree["model"])
    assert Counter(config.layers) == layers
    with torch.device("meta"):
        model = Hybrid(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
