"""The tokenizer of an imported folder: it becomes the run's, and goes out as it came."""

import dataclasses
import io
import json

import pytest
import sentencepiece
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plait.data.build import build
from plait.data.tokenizer import load_tokenizer, train_tokenizer
from plait.errors import UserError
from plait.pretrain.config_file import parse_config
from plait.pretrain.huggingface import export, export_run, import_folder
from plait.pretrain.huggingface.verify import ExportError
from plait.pretrain.trainer import Trainer

TEXTS = ["the state of the space, and a token in a chunk\n" * 9, "an expert, a router; a decay\n" * 9] * 6


@pytest.fixture
def byte_level():
    """A byte-level BPE of 300 ids as transformers holds it; </s> closes a text, <s> opens one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_the_files_of_a_hugging_face_tokenizer_go_through(save_model, byte_level, tmp_path):
    folder, _, _ = save_model(vocab_size=301)
    byte_level.save_pretrained(folder)
    imported = import_folder(folder, tmp_path / "run")
    assert imported.tokenizer is not None
    assert imported.tokenizer.kind == "huggingface"
    assert not [note for note in imported.notes if "tokenizer" in note]
    out = export_run(tmp_path / "run", tmp_path / "out").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    text = "a state of the router\n"
    ids = load_tokenizer(tmp_path / "run").encode(text)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids == byte_level(text)["input_ids"]
    # A second export takes the place of the first: all its files are its own.
    export_run(tmp_path / "run", tmp_path / "out")


def test_a_corpus_must_be_built_with_it(save_model, byte_level, tiny, tmp_path):
    folder, _, _ = save_model(vocab_size=320)
    byte_level.save_pretrained(folder)
    run = import_folder(folder, tmp_path / "hf-run").path
    tiny["checkpoint"]["init_from"] = str(run)
    config = parse_config(tiny | {"model": import_model(run)}, "test")
    with pytest.raises(UserError) as caught:
        Trainer(config)
    assert str(caught.value).endswith(
        f"train: built with another tokenizer than the one of checkpoint.init_from = {run}; "
        f"build the corpus with --tokenizer {run}"
    )
    build(tmp_path / "mine", TEXTS, load_tokenizer(run), validation=2)
    tiny["data"] = {"blend": str(tmp_path / "mine" / "train"), "seq_len": 20}
    tiny["run"]["dir"] = str(tmp_path / "on")
    trainer = Trainer(parse_config(tiny | {"model": import_model(run)}, "test"))
    here = trainer.folder.tokenizer()
    assert here is not None
    assert here.fingerprint == load_tokenizer(run).fingerprint


def import_model(run):
    return yaml.safe_load((run / "config.yaml").read_text())["model"]


def test_other_ids_are_no_export(save_model, byte_level, tmp_path, monkeypatch):
    folder, _, _ = save_model(vocab_size=301)
    byte_level.save_pretrained(folder)
    import_folder(folder, tmp_path / "run")
    real = export.export_tokenizer

    def broken(tokenizer, **options):
        brought = real(tokenizer, **options)
        tree = json.loads(brought.files["tokenizer.json"])
        tree["model"]["merges"] = tree["model"]["merges"][1:]
        return dataclasses.replace(
            brought, files=brought.files | {"tokenizer.json": json.dumps(tree).encode()}
        )

    monkeypatch.setattr(export, "export_tokenizer", broken)
    with pytest.raises(
        ExportError, match=r"gives other ids than .*run/tokenizer for a text that begins with"
    ):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_ids_than_rows(save_model, byte_level, tmp_path):
    folder, _, _ = save_model(vocab_size=131)
    byte_level.save_pretrained(folder)
    notes = import_folder(folder, tmp_path / "run").notes
    assert (
        "the tokenizer has 300 ids and the model 131 rows: a text with one of the others cannot be trained on"
    ) in notes


def test_a_sentencepiece_model_of_plait_s_kind(save_model, tmp_path):
    folder, _, _ = save_model(vocab_size=301)
    ours = train_tokenizer(TEXTS, folder / "tokenizer.model", vocab_size=290)
    imported = import_folder(folder, tmp_path / "run")
    assert imported.tokenizer is not None
    assert (imported.tokenizer.kind, imported.tokenizer.fingerprint) == ("sentencepiece", ours.fingerprint)
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert {"tokenizer.model", "tokenizer.json"} < exported.files.keys()
    assert AutoTokenizer.from_pretrained(exported.path)(TEXTS[0])["input_ids"] == ours.encode(TEXTS[0])


def test_a_sentencepiece_model_that_no_tokenizer_json_can_say(save_model, tmp_path):
    folder, _, _ = save_model(vocab_size=301)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    import_folder(folder, tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert (exported.path / "tokenizer.model").read_bytes() == model.getvalue()
    assert "tokenizer.json" not in exported.files
    assert any("no tokenizer.json was written" in note for note in exported.notes)


def test_a_tokenizer_that_is_damaged(save_model, byte_level, tmp_path):
    folder, _, _ = save_model(vocab_size=301)
    byte_level.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"hf/tokenizer\.json: not JSON"):
        import_folder(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
