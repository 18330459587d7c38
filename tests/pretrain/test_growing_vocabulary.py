"""A run that begins with another's weights and has more ids: old ones are as they were, new ones fresh."""

import shutil

import pytest
import torch
import yaml
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from plait.data.build import build
from plait.data.tokenizer import load_tokenizer
from plait.errors import UserError
from plait.pretrain.callbacks import Checkpointing
from plait.pretrain.config_file import load_config, parse_config
from plait.pretrain.loading import load_run
from plait.pretrain.model import build_model
from plait.pretrain.trainer import Trainer

OLD, NEW = 320, 333
TEXTS = ["a state of the space, grow and grown\n" * 40] * 8


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def first(tiny, kept, tmp_path):
    """A run of two steps; trained once, and copied."""
    tiny["train"]["steps"] = 2
    if not kept.exists():
        start(tiny, tmp_path).run()
        shutil.copytree(tmp_path / "run", kept)
    else:
        shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def second(tiny, first, tmp_path):
    """The config of a run that begins with it, on the same corpus, with more rows."""
    del tiny["model"]
    tiny["run"] = {"dir": str(tmp_path / "second"), "seed": 9}
    tiny["checkpoint"] |= {"init_from": str(first), "grow_vocabulary": True}
    tiny["model"] = {"vocab_size": NEW}
    return tiny


@pytest.fixture
def edited(first, second, tmp_path):
    """Makes a corpus with the first run's tokenizer, changed, and has the second run read it."""

    def make(change):
        model = model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        model.ParseFromString((first / "tokenizer.model").read_bytes())
        change(model)
        (tmp_path / "edited.model").write_bytes(model.SerializeToString())
        build(tmp_path / "edited", TEXTS, load_tokenizer(tmp_path / "edited.model"), validation=2)
        second["data"] = {"blend": str(tmp_path / "edited" / "train"), "seq_len": 50}

    return make


def add_pieces(model):
    for number in range(NEW - OLD):
        piece = model.pieces.add()
        piece.piece, piece.type, piece.score = f"grow{'n' * number}", model.pieces[0].USER_DEFINED, 0.0


pytestmark = pytest.mark.usefixtures("one_thread")


def start(tree, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return Trainer(load_config(file), [Checkpointing()])


def refusal(tree, tmp_path):
    with pytest.raises(UserError) as caught:
        start(tree, tmp_path)
    return str(caught.value).replace(str(tmp_path), "TMP")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_old_rows_are_the_weights_and_new_ones_the_seed_s(first, second, tmp_path, dtype):
    second["train"]["dtype"] = dtype
    trainer = start(second, tmp_path)
    old = load_run(str(first), dtype="float32").model.state_dict()
    fresh = build_model(trainer.config.model, seed=9).state_dict()
    here = trainer.state.model.state_dict()
    assert here.keys() == old.keys()
    for name, tensor in here.items():
        rows = OLD if name in ("embedding.weight", "head.weight") else None
        assert torch.equal(tensor[:rows].float(), old[name]), name
        if rows:
            assert tensor.shape == (NEW, 32)
            assert torch.equal(tensor[rows:].float(), fresh[name][rows:])
            assert not torch.equal(tensor[:rows].float(), fresh[name][:rows])
    assert trainer.run()
    again = start(second, tmp_path)
    assert again.resumed_from == 2


def test_a_tied_embedding_grows(tiny, tmp_path):
    tiny["model"]["tie_embeddings"] = True
    tiny["train"]["steps"] = 2
    start(tiny, tmp_path).run()
    tiny["model"] = {"vocab_size": NEW}
    tiny["checkpoint"] |= {"init_from": str(tmp_path / "run"), "grow_vocabulary": True}
    tiny["run"] = {"dir": str(tmp_path / "second"), "seed": 9}
    model = start(tiny, tmp_path).state.model
    assert model.head is None
    old = load_run(str(tmp_path / "run")).model
    assert torch.equal(model.embedding.weight[:OLD], old.embedding.weight)


def test_logits_of_old_ids_are_what_they_were(first, second, tmp_path):
    trainer = start(second, tmp_path)
    with trainer._loader() as loader:
        (micro,) = trainer.micro_batches(loader.next()[0])
    assert int(micro.tokens.max()) < OLD
    then, now = load_run(str(first)).model, trainer.state.model
    with torch.no_grad():
        hidden_then, hidden_now = (model(micro.tokens, micro.packing)[0] for model in (then, now))
        logits_then, logits_now = then.logits(hidden_then), now.logits(hidden_now)
    assert torch.equal(hidden_now, hidden_then)
    assert logits_now.shape[-1] == NEW
    # A product with more columns may add in another order.
    torch.testing.assert_close(logits_now[..., :OLD], logits_then, rtol=1e-6, atol=1e-6)


def test_a_corpus_whose_tokenizer_adds_ids(edited, second, tmp_path):
    edited(add_pieces)
    trainer = start(second, tmp_path)
    assert load_tokenizer(tmp_path / "second").vocab_size == NEW
    with trainer._loader() as loader:
        assert loader.next()[0]["tokens"].max() >= OLD
    assert trainer.run()
    assert start(second, tmp_path).resumed_from == 2


def test_rows_that_suffice_already(edited, second, tmp_path):
    """A model may have had more rows than its tokenizer had ids."""
    start({**second, "run": {"dir": str(tmp_path / "wide")}}, tmp_path).run()
    edited(add_pieces)
    second["checkpoint"]["init_from"] = str(tmp_path / "wide")
    del second["model"]
    assert start(second, tmp_path).config.model.vocab_size == NEW


def test_without_the_key_more_rows_are_refused(second, tmp_path):
    second["checkpoint"]["grow_vocabulary"] = False
    assert refusal(second, tmp_path) == (
        "checkpoint.init_from = TMP/run: the weights of another model: model.vocab_size = 320 there and 333 "
        "here; leave those keys out of the config, or begin from another run; checkpoint.grow_vocabulary = "
        "true lets model.vocab_size be larger here"
    )


def test_fewer_rows_are_refused(second, tmp_path):
    second["model"]["vocab_size"] = 319
    assert refusal(second, tmp_path) == (
        "checkpoint.init_from = TMP/run: the weights of another model: model.vocab_size = 320 there and 319 "
        "here; leave those keys out of the config, or begin from another run"
    )


def test_another_model_is_refused_all_the_same(second, tmp_path):
    second["model"]["d_model"] = 64
    assert refusal(second, tmp_path) == (
        "checkpoint.init_from = TMP/run: the weights of another model: model.d_model = 32 there and 64 here; "
        "leave those keys out of the config, or begin from another run"
    )


def test_without_the_key_a_tokenizer_that_adds_ids_is_refused(edited, second, tmp_path):
    edited(add_pieces)
    second["checkpoint"]["grow_vocabulary"] = False
    del second["model"]
    assert refusal(second, tmp_path) == (
        "TMP/edited/train: built with another tokenizer than the one of checkpoint.init_from = TMP/run; "
        "build the corpus with --tokenizer TMP/run, or set checkpoint.grow_vocabulary = true: it keeps the "
        "first 320 ids"
    )


def test_too_few_rows_for_the_tokenizer(edited, second, tmp_path):
    edited(add_pieces)
    del second["model"]
    assert refusal(second, tmp_path) == (
        "model.vocab_size = 320 has fewer rows than the tokenizer of TMP/edited/train has ids; set "
        "model.vocab_size = 333 or more"
    )


def swap(model):
    add_pieces(model)
    model.pieces[300].piece, model.pieces[301].piece = model.pieces[301].piece, model.pieces[300].piece


def cut(model):
    del model.pieces[-1]


def close_elsewhere(model):
    add_pieces(model)
    model.pieces[OLD].type = model.pieces[1].type
    model.trainer_spec.eos_id, model.trainer_spec.eos_piece = OLD, model.pieces[OLD].piece


CHANGES = {
    "another piece": (swap, "the id 300 is {0!r} there and {1!r} here"),
    "a piece less": (cut, "the id 319 is {2!r} there and none here"),
    "another end of documents": (close_elsewhere, "the id 1 closes documents there and 320 here"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_tokenizer_that_does_more_than_add(first, edited, second, tmp_path, case):
    change, fault = CHANGES[case]
    tokenizer = load_tokenizer(first)
    pieces = [tokenizer.piece(number) for number in (300, 301, 319)]
    edited(change)
    assert refusal(second, tmp_path) == (
        "TMP/edited/train: built with another tokenizer than the one of checkpoint.init_from = TMP/run, and "
        f"{fault.format(*pieces)}; checkpoint.grow_vocabulary wants one that keeps those ids and adds others"
    )


def test_a_tokenizer_that_is_not_there_to_compare(edited, second, tmp_path):
    edited(add_pieces)
    (tmp_path / "edited" / "tokenizer.model").unlink()
    assert refusal(second, tmp_path) == (
        "TMP/edited/train: built with another tokenizer than the one of checkpoint.init_from = TMP/run, and "
        "its own does not lie beside it to be compared; checkpoint.grow_vocabulary wants one that keeps "
        "those ids and adds others"
    )


def test_no_tokenizer_beside_either(first, edited, second, tmp_path):
    edited(add_pieces)
    (tmp_path / "edited" / "tokenizer.model").unlink()
    (first / "tokenizer.model").unlink()
    assert start(second, tmp_path).config.model.vocab_size == NEW


def test_the_key_alone(tiny):
    tiny["checkpoint"]["grow_vocabulary"] = True
    with pytest.raises(UserError) as caught:
        parse_config(tiny, "config")
    assert str(caught.value) == (
        "config: checkpoint.grow_vocabulary = true without checkpoint.init_from has nothing that grows; name "
        "the run to begin from, or leave it out"
    )
