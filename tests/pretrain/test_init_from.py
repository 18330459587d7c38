"""A new run that begins with another's weights: what comes along, what is fresh, what is refused."""

import json
import shutil

import pytest
import torch
import yaml

from plait.data.build import build
from plait.data.tokenizer import load_tokenizer, train_tokenizer
from plait.errors import UserError
from plait.pretrain.callbacks import Checkpointing
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.config_file import load_config
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def first(tiny, kept, tmp_path):
    """A run of 8 steps with checkpoints at 4 and 8; trained once, and copied."""
    tiny["train"]["steps"] = 8
    if not kept.exists():
        start(tiny, tmp_path).run()
        shutil.copytree(tmp_path / "run", kept)
    else:
        shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def second(tiny, first, tmp_path):
    """The config of a run that begins with the first one's weights, without a model section."""
    tree = json.loads(json.dumps(tiny))
    del tree["model"]
    tree["run"] = {"dir": str(tmp_path / "second"), "seed": 9}
    tree["checkpoint"]["init_from"] = str(first)
    return tree


def start(tree, tmp_path, *overrides):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return Trainer(load_config(file, overrides), [Checkpointing()])


def refusal(tree, tmp_path, *overrides):
    with pytest.raises(UserError) as caught:
        start(tree, tmp_path, *overrides)
    return str(caught.value).replace(str(tmp_path), "TMP")


def saved(run, step):
    (checkpoint,) = (c for c in Checkpoints(RunFolder(run).checkpoints).all() if c.step == step)
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("model.")
    }
    checkpoint.load_into(tensors, partial=True)
    return tensors


def assert_begins_with(trainer, tensors):
    here = {name: t for name, t in trainer.state.tensors().items() if name.startswith("model.")}
    assert here.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(here[name].to(tensor.dtype), tensor), name


def test_weights_and_biases_come_along_and_all_else_is_fresh(first, second, tmp_path):
    weights = saved(first, 8)
    assert weights["model.layers.3.mixer.router.correction_bias"].abs().max() > 0
    trainer = start(second, tmp_path)
    assert_begins_with(trainer, weights)
    state = trainer.state
    assert (state.step, state.samples, state.tokens, trainer.resumed_from) == (0, 0, 0, None)
    for moments in state.optimizer.state.values():
        assert not any(moment.any() for moment in moments.values())
    assert state.plan.stages[0].seed == 9
    assert len(state.plan.stages) == 1
    assert trainer.config.model == RunFolder(first).config().model
    assert RunFolder(tmp_path / "second").config() == trainer.config
    assert trainer.run()
    newest = Checkpoints(tmp_path / "second" / "checkpoints").newest()
    assert newest is not None
    assert newest.manifest.facts["origin"] == {"run": str(first), "step": 8}


def test_a_step_of_it(first, second, tmp_path):
    second["checkpoint"]["init_from"] = f"{first}@4"
    assert_begins_with(start(second, tmp_path), saved(first, 4))


def test_in_another_precision(first, second, tmp_path):
    second["train"]["dtype"] = "float64"
    trainer = start(second, tmp_path)
    assert next(trainer.state.model.parameters()).dtype == torch.float64
    assert_begins_with(trainer, saved(first, 8))


def test_the_first_loss_is_that_of_the_weights(first, second, tmp_path):
    """Of the very batch that the first run would have read next."""
    config = load_config(first / "config.yaml", ["train.steps=9", f"run.dir={tmp_path / 'on'}"])
    shutil.copytree(first, tmp_path / "on")
    on = Trainer(config)
    batch = on._loader().next()[0]
    assert on.train_step(batch)["loss"] == start(second, tmp_path).train_step(batch)["loss"]


def test_resuming_ignores_it(first, second, tmp_path):
    start(second, tmp_path, "train.stop_at=4").run()
    shutil.rmtree(first)
    trainer = start(second, tmp_path)
    assert trainer.resumed_from == 4
    assert_begins_with(trainer, saved(tmp_path / "second", 4))
    assert trainer.run()


def test_a_run_that_died_before_its_first_checkpoint_begins_again(first, second, tmp_path):
    start(second, tmp_path).close()
    assert_begins_with(start(second, tmp_path), saved(first, 8))


def test_a_part_of_the_model_section_is_filled_up(first, second, tmp_path):
    second["model"] = {"moe": {"score_bias_rate": 0.0, "aux_loss": 0.01}, "mamba": {"chunk_size": 32}}
    trainer = start(second, tmp_path, "model.moe.z_loss=0.5")
    then, now = RunFolder(first).config().model, trainer.config.model
    assert now.mamba is not None
    assert now.moe is not None
    assert (now.moe.score_bias_rate, now.moe.aux_loss, now.moe.z_loss, now.mamba.chunk_size) == (
        0,
        0.01,
        0.5,
        32,
    )
    assert then.moe is not None
    assert (now.moe.scaling, now.attention) == (then.moe.scaling, then.attention)


def test_the_same_pattern_in_brackets(second, tmp_path):
    start(second, tmp_path, "model.pattern=[M*]x1-E")


def test_another_model(first, second, tmp_path):
    second["model"] = {"d_model": 64, "moe": {"top_k": 1}}
    assert refusal(second, tmp_path) == (
        "checkpoint.init_from = TMP/run: the weights of another model: model.d_model = 32 there and 64 here, "
        "model.moe.top_k = 2 there and 1 here; leave those keys out of the config, or begin from another run"
    )
    assert not (tmp_path / "second" / "config.yaml").exists()


def test_another_pattern(second, tmp_path):
    line = refusal(second, tmp_path, "model.pattern=M-", "model.vocab_size=512", "model.tie_embeddings=true")
    assert line == (
        "checkpoint.init_from = TMP/run: the weights of another model: model.pattern = M*-E there and M- "
        "here, model.tie_embeddings = False there and True here, model.vocab_size = 320 there and 512 here; "
        "leave those keys out of the config, or begin from another run; checkpoint.grow_vocabulary = true "
        "lets model.vocab_size be larger here"
    )


PLACES = {
    "nowhere": (
        "nowhere",
        "checkpoint.init_from = nowhere: no run is here (it has no config.yaml that can be read); "
        "name the folder of a run or of an imported model",
    ),
    "no such step": (
        "RUN@5",
        "checkpoint.init_from = RUN@5: RUN: holds no checkpoint of step 5; choose one of 4, 8",
    ),
    "a step that is no number": (
        "RUN@last",
        "checkpoint.init_from = RUN@last: RUN: holds no checkpoint of step last; choose one of 4, 8",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_has_no_weights(first, second, tmp_path, case):
    place, line = PLACES[case]
    second["checkpoint"]["init_from"] = place.replace("RUN", str(first))
    assert refusal(second, tmp_path) == line.replace("RUN", "TMP/run")


def test_a_run_without_a_checkpoint(first, second, tmp_path):
    shutil.rmtree(first / "checkpoints")
    assert refusal(second, tmp_path) == (
        "checkpoint.init_from = TMP/run: TMP/run: holds no whole checkpoint yet; train on"
    )


def test_the_tokenizer_comes_along_and_must_be_the_corpus_s(first, second, tmp_path):
    start(second, tmp_path).close()
    here = load_tokenizer(tmp_path / "second")
    assert here.fingerprint == load_tokenizer(first).fingerprint
    texts = ["another tokenizer's corpus, with other pieces\n" * 40] * 8
    other = train_tokenizer(texts, tmp_path / "other.model", vocab_size=280)
    build(tmp_path / "other", texts, other, validation=2)
    second["data"] = {"blend": str(tmp_path / "other" / "train"), "seq_len": 50}
    second["run"]["dir"] = str(tmp_path / "third")
    assert refusal(second, tmp_path) == (
        "TMP/other/train: built with another tokenizer than the one of checkpoint.init_from = TMP/run; "
        "build the corpus with --tokenizer TMP/run"
    )
