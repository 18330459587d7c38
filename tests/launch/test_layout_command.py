"""`plait config layout`: what it says of ranks that are not there is what ranks hold and send."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from plait.parallel.axes import AXES
from plait.pretrain.config_file import load_config, parse_config
from plait.pretrain.layout_messages import layer_messages, outer_messages
from plait.pretrain.layout_parts import Parts

PROGRAM = Path(__file__).with_name("layout_ranks.py")

CASES = {
    "sp": {"parallel": {"sp": 2}},
    "gather": {"parallel": {"sp": 2, "state_exchange": "gather"}, "train": {"dtype": "bfloat16"}},
    "scan": {"parallel": {"sp": 2, "state_exchange": "scan", "fold_queries": False}},
    "tp": {"parallel": {"tp": 2}, "model": {"mamba": {"num_groups": 1}}, "train": {"micro_batch_size": 4}},
    "dp_shard": {"parallel": {"dp_shard": 2}, "train": {"batch_size": 5, "dtype": "float64"}},
    "ep": {"parallel": {"sp": 2, "ep": 2}},
    "ep_tp": {"parallel": {"tp": 2, "ep": 2}, "train": {"dtype": "bfloat16"}},
    "dp_replicate": {"parallel": {"dp_replicate": 2}, "model": {"tie_embeddings": True}},
}
"""All on two ranks, with a vocabulary and a length that two do not divide."""


def merged(tree: dict, changes: dict) -> dict:
    out = dict(tree)
    for key, value in changes.items():
        out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


@pytest.fixture
def cases(tiny) -> dict[str, dict]:
    odd = {
        "model": {"vocab_size": 331, "moe": {"aux_loss": 0.01}},
        "data": {"seq_len": 49},
        "run": {"dir": None},
    }
    trees = {name: merged(merged(tiny, odd), changes) for name, changes in CASES.items()}
    for name, tree in trees.items():
        tree["run"]["dir"] = f"{tiny['run']['dir']}-{name}"
    return trees


def measure(cases: dict[str, dict], folder: Path) -> list[dict]:
    """What each of two ranks held and sent, by case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), str(rank), "2"], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def sent(ledger: list[dict], layer: int | None, direction: str) -> Counter:
    """Bytes by axis and kind, those of parameters and of the step's sums left out."""
    return Counter(
        {
            (axis, kind): sum(
                e["sent"]
                for e in ledger
                if (e["layer"], e["direction"], e["axis"], e["kind"]) == (layer, direction, axis, kind)
            )
            for axis, kind in {(e["axis"], e["kind"]) for e in ledger if not e["kind"].startswith("fsdp")}
        }
    )


def said(messages) -> Counter:
    total = Counter()
    for message in messages:
        total[message.axis, message.kind] += message.sent
    return total


def test_two_ranks_hold_and_send_what_is_said_of_them(cases, tmp_path):
    measured = measure(cases, tmp_path)
    for name, tree in cases.items():
        parts = Parts(parse_config(tree, name))
        for rank in range(2):
            found, holding = measured[rank][name], parts.of(rank)
            assert found["parameters"] == holding.parameter_bytes, (name, rank)
            assert found["optimizer"] == holding.optimizer_bytes, (name, rank)
            assert found["sequences"] == [len(holding.sequences), len(holding.tokens)], (name, rank)
        ledger = measured[0][name]["ledger"]
        for index, letter in enumerate(parts.config.model.layers):
            found, expected = sent(ledger, index, "forward"), said(layer_messages(parts, letter))
            # Where tokens go is not known before; what is said is the even share.
            for kind in ("dispatch", "combine"):
                actual, even = found.pop(("ep", kind), 0), expected.pop(("ep", kind), 0)
                assert 0.5 * even <= actual <= 2 * even, (name, kind)
            assert +found == expected, (name, letter)
        units = [e for e in ledger if e["kind"] == "fsdp_all_gather" and e["direction"] == "forward"]
        assert sum(e["sent"] for e in units) == sum(unit.gather_sent for unit in parts.units), name
        reduced = [e for e in ledger if e["kind"] == "fsdp_reduce_scatter"]
        assert sum(e["sent"] for e in reduced) == sum(unit.reduce_sent for unit in parts.units), name
    outside = +sent(measured[0]["tp"]["ledger"], None, "forward")
    predicted = said(outer_messages(Parts(parse_config(cases["tp"], "tp"))))
    assert outside["tp", "reduce_scatter"] == predicted["tp", "reduce_scatter"] > 0
    # The two numbers are sent for targets only, and the last token of a document is none.
    assert 0.9 * predicted["tp", "all_gather"] < outside["tp", "all_gather"] <= predicted["tp", "all_gather"]


def test_every_token_and_parameter_is_held_as_often_as_it_should_be(tiny):
    tiny = merged(
        tiny,
        {
            "parallel": {"dp_replicate": 2, "dp_shard": 3, "sp": 4, "tp": 2},
            "train": {"batch_size": 7},
            "data": {"seq_len": 61},
        },
    )
    parts = Parts(parse_config(tiny, "case"))
    holdings = [parts.of(rank) for rank in range(parts.ranks)]
    assert len(holdings) == 48
    assert len({tuple(holding.places[axis] for axis in AXES) for holding in holdings}) == 48
    stream = Counter((s, t) for h in holdings for s in h.sequences for t in h.stream)
    assert stream == Counter({(s, t): 1 for s in range(7) for t in range(61)})
    mixers = Counter((s, t) for h in holdings for s in h.sequences for t in h.tokens)
    assert mixers == Counter({(s, t): 2 for s in range(7) for t in range(61)})
    assert {len(h.stream) + h.padding for h in holdings} == {8}
    model = parts._model
    whole = sum(p.numel() for p in model.parameters()) * 4
    replicated = sum(p.numel() for name, p in model.named_parameters() if parts._splits[name].dim is None) * 4
    assert replicated < whole
    # Each of two copies holds all once, and what tp does not cut once more.
    assert sum(h.parameter_bytes for h in holdings) == 2 * (whole + replicated)


@pytest.fixture
def layout(plait):
    """What `plait config layout` prints."""

    def run(*words: object) -> str:
        code, out, err = plait("config", "layout", *words)
        assert code == 0, err
        return out

    return run


def test_the_demo_on_two_ranks(layout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    out = layout("demo", "parallel.sp=2")
    lines = [line.split() for line in out.splitlines()]
    assert ["layout", "sp", "2,", "2", "ranks"] in lines
    assert "ring over sp (parallel.state_exchange = auto)" in out
    # 4 bytes x 5.3M parameters over two ranks.
    assert ["0", "0", "0..7", "0..255", "10.6", "MB", "21.2", "MB"] in lines
    assert ["1", "1", "0..7", "256..511", "10.6", "MB", "21.2", "MB"] in lines
    state = 8 * 8 * 64 * 64 * 4
    assert f"state by ring {state / 1e6:.2f} MB" in out


@pytest.mark.parametrize(("ranks", "shown"), [(32, [*range(32)]), (33, [*range(8), 32])])
def test_many_ranks_are_cut_short_unless_all_are_asked_for(layout, ranks, shown):
    words = ["demo", f"parallel.dp_shard={ranks}", "train.batch_size=33"]
    printed = layout(*words)
    assert rows_of(printed) == shown
    assert ("24 ranks between are not shown; --all" in printed) == (ranks > 32)
    assert rows_of(layout(*words, "--all")) == [*range(ranks)]


def rows_of(printed: str) -> list[int]:
    """The ranks that the table has a row for; a row begins right-aligned under "rank"."""
    _, table = printed.split("rank  ", 1)
    return [int(line[:4]) for line in table.splitlines()[1:] if line[:4].strip().isdigit()]


def test_four_thousand_ranks_fit_a_hundred_columns(layout, tmp_path):
    shipped = Path(load_config.__code__.co_filename).parent.parent / "configs" / "models"
    tree = {
        "include": str(shipped / "nemotron-h-8b.yaml"),
        "run": {"dir": "runs/large"},
        "data": {"blend": "corpora/x/train", "seq_len": 262143},
        "train": {"steps": 1000, "batch_size": 128, "micro_batch_size": 1},
        "optim": {"lr": 3e-4},
        "parallel": {"dp_replicate": 4, "dp_shard": 4, "sp": 32, "tp": 8},
    }
    file = tmp_path / "large.yaml"
    file.write_text(yaml.dump(tree))
    out = layout(file)
    assert "4,096 ranks" in out
    assert "scan over sp" in out
    assert max(map(len, out.splitlines())) <= 100
    last = next(line.split() for line in out.splitlines() if line.startswith("4095"))
    assert last[:8] == ["4095", "3", "3", "31", "7", "120..127", "253952..262142", "261120..262142"]
    # A state of fp32 and its decays, in as many rounds as log2 of 32.
    scan = math.log2(32) * (16 * 64 * 128 + 16) * 4
    assert f"state by scan {scan / 1e6:.2f} MB" in out


def test_an_impossible_layout_is_one_line_with_those_that_work(plait):
    code, _, error = plait("config", "layout", "demo", "parallel.tp=3")
    assert code == 2
    assert error.count("\n") == 1
    assert "parallel.tp = 3 does not divide model.mamba.num_heads = 8" in error
    assert "layouts of 3 ranks that work: sp 3" in error
