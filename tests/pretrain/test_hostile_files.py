"""Files made to do harm, drawn at random and by hand: each is read as it is or refused in one line, in a
bounded time, and with little memory."""

import contextlib
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from hypothesis import strategies as st

from plait.data.shards import Shard
from plait.errors import LONGEST, UserError
from plait.pretrain.checkpoint import Checkpoint, Checkpoints
from plait.pretrain.config_file import dump_config, load_config, parse_config
from plait.pretrain.huggingface.loading import load_folder
from plait.pretrain.loading import load_run
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.saved_facts import check_origin, check_progress
from plait.pretrain.trainer import Trainer

SECONDS, ROOM = 5.0, 400 << 20
"""Of the processor, and bytes of memory above what is taken already; a thread's stacks are within it."""

COUNTS = [30, pytest.param(600, marks=pytest.mark.long)]
"""Drawn files of each kind."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, -(10**30)),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "../../etc/passwd", "/dev/zero", "\ud800", "\x1b]0;x\x07", "a\nb", "x" * 10_000),
    *("M" * 5000, "[" * 300, "[[ME]x999]x999", "!!python/object/apply:os.system [ls]", "float32", "BF16"),
    *([], {}, [[]], [0] * 100, [2**62, 2**62], [2**40, 0, 2**40], [1e400], {"a": {}}, {"": None}),
]


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """No hang, and no large allocation: one of either fails."""

    def hangs(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    page = os.sysconf("SC_PAGE_SIZE")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * page
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(120)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    began = time.process_time()
    try:
        yield
        assert time.process_time() - began < SECONDS
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survived(*readers: Callable[[], object]) -> list[str]:
    """The lines of those readers that refused."""
    said = []
    with bounds():
        for reader in readers:
            try:
                reader()
            except UserError as error:
                said.append(str(error))
    for line in said:
        assert line.isprintable()
        assert len(line) <= LONGEST + 3
    return said


def drawn(count: int) -> Callable[[Callable[[random.Random], None]], None]:
    """Run a body with that many sources of randomness."""

    def decorate(body: Callable[[random.Random], None]) -> None:
        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=tuple(hypothesis.HealthCheck),  # pyright: ignore,
        )
        @hypothesis.given(st.integers(0, 2**32))
        def run(seed: int) -> None:
            body(random.Random(seed))

        run()

    return decorate


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree with each of its keys."""
    pairs: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            pairs.append((node, key))
            stack.append(value)
    return pairs


def reshape(tree: Any, draw: random.Random) -> Any:
    """The tree with one to three of its values put otherwise."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 2, 3])):
        found = places(tree)
        if not found:
            return draw.choice(VALUES)
        node, key = draw.choice(found)
        kind = draw.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, their_key = draw.choice(found)
            node[key] = copy.deepcopy(other[their_key])
        elif kind == 2 and isinstance(node, dict):
            node[draw.choice(["", "../x", "\ud800", "rank-00009.bin", "x" * 3000])] = node.pop(key)
        elif kind == 3 and type(node[key]) is int:
            node[key] = draw.choice([-node[key], node[key] + 1, node[key] * 2**20, node[key] - 1])
        else:
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def scratch(data: bytes, draw: random.Random) -> bytes:
    """The bytes cut off, flipped, doubled, zeroed or written over."""
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 1, 8])):
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:end] + data[at:]
    if kind == 3:
        return data[:at] + bytes(end - at) + data[end:]
    return data[:at] + draw.randbytes(min(8, len(data) - at)) + data[at + 8 :]


def hostile_json(tree: Any, data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.75:
        return json.dumps(reshape(tree, draw)).encode("ascii")
    return scratch(data, draw)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tiny: dict) -> Path:
    """A run with one checkpoint, of step 0."""
    trainer = Trainer(parse_config(tiny, "test"))
    trainer.checkpoints.save(0, trainer.state.tensors(), trainer.state.facts(trainer.config))
    trainer.checkpoints.wait()
    trainer.close()
    trainer.folder.prepare(trainer.config)
    return trainer.folder.path


@pytest.fixture
def step(run: Path) -> Path:
    return run / "checkpoints" / "step-00000000"


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


@pytest.mark.parametrize("count", COUNTS)
def test_shards(corpus: Path, tmp_path: Path, count: int) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    prefix = tmp_path / "corpus" / "train"
    whole = {
        name: (prefix.parent / name).read_bytes() for name in ("train.idx", "train.bin", "manifest.json")
    }
    tree = json.loads(whole["manifest.json"])
    # Megatron's reader takes its time to import, once.
    assert len(Shard(prefix).tokens(0, 5)) == 5

    def read() -> None:
        shard = Shard(prefix)
        shard.read(0, shard.num_tokens)
        for _ in shard.document_lengths():
            pass
        _ = shard.content
        shard.document_at(shard.num_tokens // 2)
        shard.check_index()

    @drawn(count)
    def _(draw: random.Random) -> None:
        for name, data in whole.items():
            (prefix.parent / name).write_bytes(data)
        name = draw.choice(["train.idx", "train.idx", "train.bin", "manifest.json"])
        changed = hostile_json(tree, whole[name], draw) if name == "manifest.json" else None
        (prefix.parent / name).write_bytes(changed or scratch(whole[name], draw))
        if name == "train.idx" and draw.random() < 0.5:
            (prefix.parent / "manifest.json").unlink()
        survived(read)


@pytest.fixture
def huggingface(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three files of tensors, an index and a config.json."""
    from plait.pretrain.huggingface import export, export_run

    # transformers is not asked whether it agrees: what is read here is read by plait.
    monkeypatch.setattr(
        export, "check_model", lambda *_, **__: type("Yes", (), {"logit_error": 0.0, "positions": 1})
    )
    monkeypatch.setattr(export, "check_tokenizer", lambda *_, **__: None)
    export_run(run, tmp_path / "hf", shard_bytes=40_000)
    return tmp_path / "hf"


@pytest.mark.parametrize("count", COUNTS)
def test_folders_of_hugging_face(huggingface: Path, count: int) -> None:
    whole = {path.name: path.read_bytes() for path in huggingface.iterdir() if path.is_file()}
    shards = sorted(name for name in whole if name.endswith(".safetensors"))
    assert len(shards) > 1
    assert load_folder(huggingface).model

    @drawn(count)
    def _(draw: random.Random) -> None:
        for name, data in whole.items():
            (huggingface / name).write_bytes(data)
        name = draw.choice(["config.json", "model.safetensors.index.json", *shards[:2]])
        data = whole[name]
        if name.endswith(".json"):
            changed = hostile_json(json.loads(data), data, draw)
        elif draw.random() < 0.7:
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(reshape(json.loads(data[8 : 8 + size]), draw)).encode("ascii")
            changed = len(header).to_bytes(8, "little") + header + data[8 + size :]
        else:
            changed = scratch(data[: min(len(data), 4000)], draw) + data[4000:]
        (huggingface / name).write_bytes(changed)
        survived(lambda: load_folder(huggingface))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def terabyte(path: Path) -> None:
    os.truncate(path, 1 << 40)


def nested(path: Path) -> None:
    path.write_text("[" * 200_000)


def leads_out(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("harm", [pipe, endless, folder, terabyte, nested, leads_out])
@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "rank-00000.bin"])
def test_what_is_no_file_of_a_checkpoint(
    run: Path, step: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(step / name)
    said = survived(*readers(run, step)[:3])
    assert len(said) == 3
    assert f"{step}/{name}: " in said[1] or f"{step}/metadata.json: " in said[1]


@pytest.mark.parametrize("harm", [pipe, endless, folder, terabyte, nested])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_is_no_file_of_a_hugging_face_folder(
    huggingface: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(huggingface / name)
    (said,) = survived(lambda: load_folder(huggingface))
    assert str(huggingface) in said


@pytest.mark.parametrize("harm", [pipe, endless, folder, terabyte, nested])
@pytest.mark.parametrize("name", ["manifest.json", "train.idx"])
def test_what_is_no_file_of_a_corpus(
    corpus: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    harm(tmp_path / "corpus" / name)
    (said,) = survived(lambda: Shard(tmp_path / "corpus" / "train"))
    assert str(tmp_path / "corpus") in said


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


def test_pickles_are_not_opened(huggingface: Path) -> None:
    for path in huggingface.glob("*.safetensors*"):
        path.unlink()
    (huggingface / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    (said,) = survived(lambda: load_folder(huggingface))
    assert "its weights are pickles (pytorch_model.bin)" in said


def test_a_run_is_still_read(run: Path, tiny: dict) -> None:
    assert survived(*readers(run, run / "checkpoints" / "step-00000000")) == []
    assert RunFolder(run).config() == parse_config(tiny, "test")
    assert load_run(str(run)).config == parse_config(
        yaml.safe_load(dump_config(parse_config(tiny, "t"))), "t"
    )
