"""Checkpoints made to do harm: each is read as it is or refused in one line, soon and with little memory."""

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostility import (
    COUNTS,
    drawn,
    endless,
    folder,
    hostile_json,
    leads_out,
    nested,
    pipe,
    reshape,
    scratch,
    survived,
    terabyte,
)

from plait.launch.checkpoint_tables import show_checkpoint, show_list
from plait.pretrain.checkpoint import Checkpoint, Checkpoints
from plait.pretrain.config_file import dump_config, load_config, parse_config
from plait.pretrain.loading import load_run
from plait.pretrain.named_checkpoints import find_entries
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.saved_facts import check_origin, check_progress
from plait.pretrain.train_state import changed_keys


def sign(step: Path, manifest: dict[str, Any] | None = None) -> None:
    """Make a manifest agree with the files and with itself: who wants harm can do so."""
    path = step / "manifest.json"
    body = json.loads(path.read_bytes()) if manifest is None else manifest
    body.pop("sha256", None)
    if manifest is None:
        for name, entry in body["files"].items():
            data = (step / name).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body | {"sha256": checksum}))


def readers(run: Path, step: Path) -> list[Callable[[], object]]:
    """What opens a checkpoint: a command, the start of a training, and who only looks."""
    checkpoint = Checkpoint(step, 0)
    return [
        lambda: load_run(str(run)),
        lambda: load_run(f"{run}@0"),
        lambda: Checkpoints(run / "checkpoints").newest_intact(),
        lambda: list(checkpoint.damages()),
        lambda: check_progress(checkpoint),
        lambda: check_origin(checkpoint),
        lambda: changed_keys(checkpoint, RunFolder(run).config()),
        lambda: show_checkpoint(RunFolder(run), checkpoint),
        lambda: show_list(RunFolder(run), find_entries(RunFolder(run))),
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_manifests(run: Path, step: Path, count: int) -> None:
    path = step / "manifest.json"
    data = path.read_bytes()
    tree = json.loads(data)

    @drawn(count)
    def _(draw: random.Random) -> None:
        manifest = copy.deepcopy(tree)
        kind = draw.randrange(4)
        if kind == 0:
            config = reshape(yaml.safe_load(manifest["facts"]["config"]), draw)
            manifest["facts"]["config"] = yaml.safe_dump(config)
        if kind == 1:
            manifest["facts"] = reshape(manifest["facts"], draw)
        if kind == 2:
            manifest = reshape(manifest, draw)
        path.write_bytes(scratch(data, draw))
        if kind < 3 and isinstance(manifest, dict):
            sign(step, manifest)
        survived(*readers(run, step))


@pytest.mark.parametrize("count", COUNTS)
def test_indices_of_tensors(run: Path, step: Path, count: int) -> None:
    path = step / "metadata.json"
    data = path.read_bytes()
    tree = json.loads(data)

    @drawn(count)
    def _(draw: random.Random) -> None:
        path.write_bytes(hostile_json(tree, data, draw))
        sign(step)
        survived(*readers(run, step))


@pytest.mark.parametrize("harm", [pipe, endless, folder, terabyte, nested, leads_out])
@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "rank-00000.bin"])
def test_what_is_no_file_of_a_checkpoint(
    run: Path, step: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(step / name)
    said = survived(*readers(run, step)[:3])
    assert len(said) == 3
    assert f"{step}/{name}: " in said[1] or f"{step}/metadata.json: " in said[1]


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "!!python/object/apply:os.system [touch x]",
        "!!int x",
        "[" * 5_000,
        "- 1\n- 2",
        "\0",
    ],
)
def test_configs_in_a_checkpoint(run: Path, step: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    manifest = json.loads((step / "manifest.json").read_bytes())
    manifest["facts"]["config"] = text
    sign(step, manifest)
    (said,) = survived(lambda: load_run(str(run)))
    assert f"{step}/manifest.json: its config " in said
    assert not (run / "x").exists()
    (run / "config.yaml").write_text(text)
    (said,) = survived(lambda: load_config(run / "config.yaml"))
    assert str(run / "config.yaml") in said


def test_a_model_that_the_files_do_not_hold(run: Path, step: Path) -> None:
    """Its memory is not asked for before that is known."""
    manifest = json.loads((step / "manifest.json").read_bytes())
    config = yaml.safe_load(manifest["facts"]["config"])
    for key, value in (
        ("d_model", 2**20),
        ("vocab_size", 10**9),
        ("d_model", 10**30),
        ("pattern", "[M]x4096"),
    ):
        changed = copy.deepcopy(config)
        changed["model"][key] = value
        manifest["facts"]["config"] = yaml.safe_dump(changed)
        sign(step, manifest)
        (said,) = survived(lambda: load_run(str(run)))
        assert str(step) in said


def test_a_tensor_of_a_billion_elements_that_no_file_holds(run: Path, step: Path) -> None:
    index = json.loads((step / "metadata.json").read_bytes())
    chunk = {"offsets": [0], "sizes": [10**9], "file": "rank-00000.bin", "position": 0, "length": 4 * 10**9}
    index["tensors"]["carried.x"] = {"dtype": "float32", "shape": [10**9], "chunks": [chunk]}
    (step / "metadata.json").write_text(json.dumps(index))
    sign(step)
    (said,) = survived(lambda: load_run(f"{run}@0"))
    assert "carried.x" in said
    assert "beyond the end of rank-00000.bin" in said


def test_a_run_is_still_read(run: Path, tiny: dict) -> None:
    assert survived(*readers(run, run / "checkpoints" / "step-00000000")) == []
    assert RunFolder(run).config() == parse_config(tiny, "test")
    assert load_run(str(run)).config == parse_config(
        yaml.safe_load(dump_config(parse_config(tiny, "t"))), "t"
    )
