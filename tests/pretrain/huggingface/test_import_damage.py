"""Files and folders that an import refuses: cut off, incomplete, lying; nothing is left behind."""

import json
import os
import shutil

import pytest

from plait.errors import UserError
from plait.pretrain.huggingface import import_folder


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(save_model, refusal, length):
    folder, _, _ = save_model()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    line = refusal(folder)
    assert line.startswith("HF/model.safetensors: not a whole safetensors file (")
    assert line.endswith("); download it again")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json(save_model, refusal, name, content):
    folder, _, _ = save_model("nvidia")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    reason = "holds list, not an object of keys" if content == "[1, 2]" else "not JSON, perhaps cut off"
    assert refusal(folder) == f"HF/{name}: {reason}; download it again"


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unnamed_shards(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


FOLDERS = {
    "pickles": (
        pickles,
        "HF: its weights are pickles (pytorch_model.bin), which can run code and are never opened; "
        "save the model as safetensors",
    ),
    "shards without an index": (
        unnamed_shards,
        "HF: holds model-00001-of-00002.safetensors but no model.safetensors and no "
        "model.safetensors.index.json; bring the whole folder",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "HF: holds no safetensors file; name a folder with model.safetensors or model.safetensors.index.json",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "HF/config.json: No such file or directory; bring the whole folder",
    ),
    "no folder": (
        shutil.rmtree,
        "HF: no such folder; name one that holds config.json and safetensors files",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_whole(save_model, tmp_path, case):
    folder, _, _ = save_model()
    spoil, line = FOLDERS[case]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        import_folder(folder, tmp_path / "run")
    assert str(caught.value).replace(str(folder), "HF") == line
    assert not (tmp_path / "run").exists()


FIRST, LAST = "backbone.embeddings.weight", "lm_head.weight"

PLACES = [
    "../secret.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "..",
    "",
    "model.bin",
    7,
    None,
    ["model.safetensors"],
    "a\0b.safetensors",
]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_that_leads_out_of_the_folder(save_model, refusal, place):
    folder, _, _ = save_model("nvidia")
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"][FIRST] = place
    index.write_text(json.dumps(tree))
    assert refusal(folder) == (
        f"HF/model.safetensors.index.json: places {FIRST} in {json.dumps(place)}, which is no safetensors "
        "file of this folder; download it again"
    )


def test_an_index_that_lies(save_model, refusal):
    folder, _, _ = save_model("nvidia")
    index = folder / "model.safetensors.index.json"
    honest = json.loads(index.read_text())
    places = honest["weight_map"]
    here, there = places[FIRST], places["backbone.norm_f.weight"]
    assert here != there

    def say(weight_map):
        index.write_text(json.dumps(honest | {"weight_map": weight_map}))
        return refusal(folder)

    name = "HF/model.safetensors.index.json"
    assert say({FIRST: there} | {k: v for k, v in places.items() if k != FIRST}) == (
        f"{name}: places {FIRST} in {there}, which does not hold it; download both again"
    )
    assert say(places | {"mtp.x": there}) == (
        f"{name}: places mtp.x in {there}, which does not hold it; download both again"
    )
    assert say({k: v for k, v in places.items() if k != FIRST}) == (
        f"{name}: does not place {FIRST} in {here}, which holds it; download both again"
    )
    assert say(places | {FIRST: "model-00009-of-00009.safetensors"}) == (
        "HF/model-00009-of-00009.safetensors: missing, and model.safetensors.index.json names it; "
        "bring the whole folder"
    )
    for nothing in ({}, [], None):
        assert say(nothing) == f"{name}: has no weight_map of tensors and files; download it again"


def test_links_as_the_hub_s_cache_makes_them(save_model, tmp_path):
    folder, _, _ = save_model("nvidia")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        os.symlink(f"../blobs/{number}", file)
    assert import_folder(folder, tmp_path / "run").model.layers == "M*-EM"


def test_what_is_at_the_run_s_place_stays(save_model, tmp_path):
    folder, _, _ = save_model()
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"run: exists and is not empty; choose another name for the run"):
        import_folder(folder, run)
    (run / "thesis.tex").unlink()
    import_folder(folder, run)
    with pytest.raises(UserError, match="exists and is not empty"):
        import_folder(folder, run)
    with pytest.raises(UserError, match="is no folder; choose another name for the run"):
        import_folder(folder, folder / "config.json")


def test_a_full_disk(save_model, refusal, monkeypatch):
    folder, _, _ = save_model()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plait.pretrain.checkpoint.files.HashingFile.append", full)
    assert "No space left on device" in refusal(folder)
