"""Shards that others wrote: megatron-core's builder, raw numpy, and files that are damaged."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.data.megatron import indexed_dataset
from plait.data.plan import Plan, open_blend
from plait.data.shards import Shard
from plait.data.window import window
from plait.errors import UserError
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

DOCUMENTS = [[60], [], [30, 25, 4], [7], [0, 11], [], [140], [90, 33]]


@pytest.fixture
def twins(write_shards, tmp_path: Path) -> tuple[Path, Path]:
    """The same documents by raw numpy to the documented layout, and by megatron-core's own builder."""
    raw, stream = write_shards(DOCUMENTS)
    builder = indexed_dataset().IndexedDatasetBuilder(f"{tmp_path}/megatron.bin", dtype=np.uint16)
    begin = 0
    for lengths in DOCUMENTS:
        document = stream[begin : begin + sum(lengths)]
        builder.add_document(document, lengths)
        begin += len(document)
    builder.finalize(f"{tmp_path}/megatron.idx")
    return raw, tmp_path / "megatron"


def test_both_writers_give_the_same_windows(twins: tuple[Path, Path]) -> None:
    opened = [open_blend({str(prefix): 1}) for prefix in twins]
    plans = [Plan.start(sources, seed=1, seq_len=23) for sources, _ in opened]
    assert plans[0].fingerprint == plans[1].fingerprint
    for index in range(100):
        one, other = (window(plan, shards, index) for plan, (_, shards) in zip(plans, opened, strict=True))
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_both_writers_train_alike(twins: tuple[Path, Path], tiny: dict, tmp_path: Path) -> None:
    losses = []
    for prefix in twins:
        tiny["run"]["dir"] = str(tmp_path / f"run-{prefix.name}")
        tiny["data"] = {"blend": {str(prefix): 1}, "seq_len": 23}
        trainer = Trainer(parse_config(tiny, "test"))
        with trainer._loader() as loader:
            losses.append([trainer.train_step(loader.next()[0])["loss"] for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


EXTREMES = st.sampled_from([0, 1, 2, 3, -1, 8, 127, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63), 2**63 - 1])


@st.composite
def damage(draw: st.DrawFn, size: int) -> list[tuple[int, bytes]]:
    """Some places of an index and what is written there: bytes, or numbers as the format has them."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        form = draw(st.sampled_from(["<q", "<i"]))
        value = draw(EXTREMES)
        number = struct.pack(form, value) if form == "<q" else struct.pack("<q", value)[:4]
        # The header, where one byte changes everything, as often as the rest.
        place = draw(st.integers(9, 33) | st.integers(34, size - 1))
        edits.append((place, draw(st.just(number) | st.binary(min_size=1, max_size=3))))
    return edits


def edited(content: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for place, change in edits:
        content = content[:place] + change + content[place + len(change) :]
    return content


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=400,
    deadline=None,
)
@given(st.data())
def test_a_damaged_index_gives_tokens_or_one_line(write_shards, data: st.DataObject) -> None:
    prefix, _ = write_shards(DOCUMENTS)
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    content = edited(whole, data.draw(damage(len(whole))))
    index.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    said = f"{prefix}"
    tracemalloc.start()
    try:
        shard = Shard(prefix)
        for start in range(0, shard.num_tokens - 1, 7):
            tokens, starts = shard.read(start, min(40, shard.num_tokens - start))
            assert len(tokens) == len(starts)
        list(shard.document_lengths(3))
        shard.document_at(5)
        shard.check_index()
    except UserError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said.startswith(str(prefix))
    assert "\n" not in said
    assert peak < 2e6


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (34 + 4 * 3, struct.pack("<i", -4)),
        (34 + 4 * 11 + 8 * 4, struct.pack("<q", 10**15)),
        (34 + 4 * 11 + 8 * 4, struct.pack("<q", -8)),
        (34 + 12 * 11 + 8 * 3, struct.pack("<q", 10**15)),
        (34 + 12 * 11 + 8 * 3, struct.pack("<q", 0)),
    ],
)
def test_an_index_damaged_inside_is_found_out(write_shards, place: int, value: bytes) -> None:
    prefix, _ = write_shards(DOCUMENTS)
    index = Path(f"{prefix}.idx")
    Shard(prefix).check_index()
    index.write_bytes(edited(index.read_bytes(), [(place, value)]))
    with pytest.raises(UserError, match="its entries contradict one another; it is damaged"):
        Shard(prefix).check_index()
