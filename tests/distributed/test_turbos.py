"""configs/turbos-tiny.yaml as it stands, on four ranks of tp, sp and ep at once: trains, resumes, exports."""

import shutil
from pathlib import Path

import pytest
import yaml
from agreement import assert_same_steps, differences
from pool import change

from plait.errors import UserError
from plait.pretrain.config_file import dump_config, load_config
from plait.pretrain.huggingface.export import export_run

CONFIG = Path(__file__).parents[2] / "configs" / "turbos-tiny.yaml"

FITS = {
    "model.attention.qk_norm": False,
    "model.attention.rope_theta": None,
    "model.moe.activation": "squared_relu",
}
"""What nemotron_h cannot say."""


@pytest.fixture
def turbos(corpus):
    """The file's tree with the tests' corpus, shorter windows and fewer steps."""

    def make(changes=None, **parallel):
        tree = yaml.safe_load(dump_config(load_config(CONFIG, ["run.dir=unused"])))
        del tree["run"]["dir"]
        tree["data"] |= {"blend": {str(corpus / "train"): 1.0}, "validation": str(corpus / "validation")}
        tree["data"]["seq_len"] = 130
        tree["train"] |= {"steps": 4, "dtype": "float64"}
        tree["optim"] |= {"warmup_steps": 1}
        tree["checkpoint"]["every"] = tree["evaluate"]["every"] = 2
        tree["evaluate"]["batches"] = 1
        change(tree, changes or {})
        return tree if not parallel else tree | {"parallel": parallel}

    return make


def test_the_proportions_are_those_of_the_large_one(turbos):
    tree = turbos()
    pattern = tree["model"]["pattern"]
    assert pattern == "[ME]x4*E[ME]x4"
    assert {axis: tree["parallel"][axis] for axis in ("sp", "tp", "ep")} == {"sp": 2, "tp": 2, "ep": 4}


def test_it_trains_as_on_one_rank(ranks, one_rank, turbos):
    one = one_rank("training", turbos(sp=1), steps=2)
    assert_same_steps(ranks("training", turbos(), steps=2), one, 1e-9)


@pytest.mark.long
def test_it_resumes_and_exports(ranks, one_rank, turbos, tmp_path):
    whole = ranks("resuming", turbos(), run_dir=tmp_path / "whole", seed=0)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    again = ranks("resuming", turbos(), run_dir=tmp_path / "cut", seed=0)
    for rank, before in zip(again, whole, strict=True):
        assert rank["resumed_from"] == 2
        assert rank["steps"] == before["steps"][2:]
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    alone = one_rank.run("resuming", turbos(sp=1), run_dir=tmp_path / "cut", seed=0)
    assert max(differences(alone["steps"], whole[0]["steps"][2:]).values()) <= 1e-9
    with pytest.raises(UserError, match=r"rope_theta|qk_norm|swiglu"):
        export_run(tmp_path / "whole", tmp_path / "hf")


@pytest.mark.long
def test_it_exports_where_nemotron_h_knows_its_layers(ranks, turbos, tmp_path):
    ranks("resuming", turbos(FITS | {"train.dtype": "float32"}), run_dir=tmp_path / "run", seed=0)
    exported = export_run(tmp_path / "run", tmp_path / "hf")
    assert exported is not None
    assert (tmp_path / "hf" / "config.json").exists()
