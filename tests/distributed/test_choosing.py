"""Two ranks take the same checkpoint, and read its files between them."""

from pathlib import Path

import pytest
import torch

from plait.pretrain.checkpoint import Checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        Checkpoints(folder).save(step, {"w": torch.full((1000,), float(step))}, {})
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_files_are_read_once(ranks, saved: Path) -> None:
    found = ranks.run("choosing", 2, folder=str(saved))
    assert [rank["step"] for rank in found] == [3, 3]
    assert [rank["read"] for rank in found] == [["3/rank-00000.bin"], ["3/metadata.json"]]
    assert [rank["warned"] for rank in found] == [[], []]


@pytest.mark.parametrize("name", ["rank-00000.bin", "metadata.json"])
def test_damage_that_one_rank_finds_counts_for_all(ranks, saved: Path, name: str) -> None:
    flip(saved / "step-00000003" / name)
    first, second = ranks.run("choosing", 2, folder=str(saved))
    assert (first["step"], second["step"]) == (2, 2)
    (line,) = first["warned"]
    assert line.startswith(f"checkpoint skipped: {saved}/step-00000003/{name}: damaged: its checksum")
    assert second["warned"] == []


def test_rank_0_chooses(ranks, saved: Path) -> None:
    """It sees the first alone, and the other, which sees all, takes that too."""
    found = ranks.run("choosing", 2, folder=str(saved), blind=0)
    assert [rank["step"] for rank in found] == [1, 1]


def test_what_a_rank_does_not_see_is_passed_over(ranks, saved: Path) -> None:
    found = ranks.run("choosing", 2, folder=str(saved), blind=1)
    assert [rank["step"] for rank in found] == [1, 1]
    lines = found[0]["warned"]
    assert [line.partition("/step-")[2][:8] for line in lines] == ["00000003", "00000002"]
    assert all("No such file or directory" in line for line in lines)


def test_none_intact_is_an_error_on_both(ranks, saved: Path) -> None:
    for step in (1, 2):
        flip(saved / f"step-0000000{step}" / "rank-00000.bin")
    (saved / "step-00000003" / "manifest.json").unlink()
    found = ranks.run("choosing", 2, folder=str(saved))
    assert len({rank["error"] for rank in found}) == 1
    assert found[0]["error"].startswith(f"{saved}: none of its checkpoints is whole")
    assert len(found[0]["warned"]) == 3
