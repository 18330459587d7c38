"""By the ledger: what is sent is launched before the computation that hides it and waited for after it."""

from collections import Counter

import pytest
from layouts import EXCHANGES

STATES = tuple(f"state_{kind}" for kind in EXCHANGES)


def entries(rank, *kinds, **where):
    """The entries of some kinds that agree with all that is given."""
    return [
        e
        for e in rank["entries"]
        if e["kind"] in kinds and all(e[key] == value for key, value in where.items())
    ]


def marks(rank, label, direction):
    return [mark["at"] for mark in rank["marks"] if (mark["label"], mark["direction"]) == (label, direction)]


def mamba_layers(rank):
    return [index for index, letter in enumerate(rank["layers"]) if letter == "M"]


@pytest.fixture(
    params=[
        ({"sp": 2, "tp": 2, "state_exchange": "ring"}, False),
        ({"sp": 4, "state_exchange": "gather"}, True),
        ({"sp": 4, "state_exchange": "scan"}, True),
        ({"sp": 4, "state_exchange": "ring"}, True),
    ],
    ids=["ring-tp", "gather-recomputed", "scan-recomputed", "ring-recomputed"],
)
def found(request, ranks, tree):
    """Ledgers of all ranks, of one step of two micro-batches."""
    layout, recompute = request.param
    changes = {
        "model.pattern": "M*M",
        "train.activation_checkpointing": recompute,
        "train.batch_size": 2,
        "train.micro_batch_size": 1,
    }
    return ranks("events", tree(changes, **layout))


def test_the_z_projection_hides_the_state(found):
    for rank in found:
        for layer in mamba_layers(rank):
            for direction in ("forward", "backward"):
                exchanges = entries(rank, *STATES, layer=layer, direction=direction)
                begins = marks(rank, f"{layer}.z_proj begins", direction)
                ends = marks(rank, f"{layer}.z_proj ends", direction)
                also = marks(rank, f"{layer}.c_proj begins", direction)
                assert len(exchanges) == len(begins) == len(ends) == len(also) == rank["micro_batches"]
                for exchange, begin, end, c in zip(exchanges, begins, ends, also, strict=True):
                    assert exchange["launched"] < begin < end < exchange["waited"]
                    assert exchange["launched"] < c < exchange["waited"]


def test_the_x_projection_hides_the_halo(found):
    for rank in found:
        for layer in mamba_layers(rank):
            for direction in ("forward", "backward"):
                halos = entries(rank, "halo", layer=layer, direction=direction)
                begins = marks(rank, f"{layer}.x_proj begins", direction)
                ends = marks(rank, f"{layer}.x_proj ends", direction)
                assert len(halos) == len(begins) == len(ends) == rank["micro_batches"]
                for halo, begin, end in zip(halos, begins, ends, strict=True):
                    assert halo["launched"] < begin < end < halo["waited"]


def test_a_recomputed_layer_sends_no_state_and_no_halo_again(found):
    for rank in found:
        sent = Counter((e["layer"], e["direction"]) for e in entries(rank, *STATES))
        halos = Counter((e["layer"], e["direction"]) for e in entries(rank, "halo"))
        once = {
            (layer, direction): rank["micro_batches"]
            for layer in mamba_layers(rank)
            for direction in ("forward", "backward")
        }
        assert sent == halos == once


def test_recomputation_is_seen(ranks, tree):
    """Or the test before would say nothing: the projections run again, and so do tp's collectives."""
    changes = {"model.pattern": "M", "train.activation_checkpointing": True}
    for rank in ranks("events", tree(changes, sp=2, tp=2)):
        assert marks(rank, "0.z_proj begins", "recompute")
        assert entries(rank, "all_gather", axis="tp", layer=0, direction="recompute")


EXPERTS = {
    "model.pattern": "ME",
    "model.moe.latent_dim": 16,
    "train.batch_size": 2,
    "train.micro_batch_size": 1,
}
ROWS = ("dispatch", "combine")


@pytest.mark.parametrize("layout", [{"sp": 2, "ep": 2}, {"sp": 2, "tp": 2, "ep": 4}], ids=str)
def test_projections_hide_tokens_on_their_way_to_experts_and_back(ranks, tree, layout):
    hidden_by = {
        "expert_counts": "latent_in_proj",
        "dispatch": "shared.up_proj",
        "combine": "shared.down_proj",
    }
    for rank in ranks("events", tree(EXPERTS, **layout)):
        for direction in ("forward", "backward"):
            for kind, label in hidden_by.items():
                if kind == "expert_counts" and direction == "backward":
                    continue
                sent = entries(rank, kind, layer=1, direction=direction)
                begins = marks(rank, f"1.{label} begins", direction)
                ends = marks(rank, f"1.{label} ends", direction)
                assert len(sent) == len(begins) == len(ends) == rank["micro_batches"]
                for entry, begin, end in zip(sent, begins, ends, strict=True):
                    assert entry["launched"] < begin < end < entry["waited"]


@pytest.mark.parametrize("keeps", [False, True])
def test_a_recomputed_layer_sends_no_counts_again_and_rows_if_it_did_not_keep_them(ranks, tree, keeps):
    config = tree(EXPERTS | {"train.activation_checkpointing": True}, sp=2, ep=2, keep_dispatched=keeps)
    for rank in ranks("events", config):
        times = rank["micro_batches"]
        sent = Counter((e["kind"], e["direction"]) for e in entries(rank, "expert_counts", *ROWS, layer=1))
        again = {} if keeps else {(kind, "recompute"): times for kind in ROWS}
        there_and_back = {(kind, d): times for kind in ROWS for d in ("forward", "backward")}
        assert sent == {("expert_counts", "forward"): times} | there_and_back | again


def test_gradients_are_reduced_in_the_last_micro_batch_only(ranks, tree):
    changes = {"train.batch_size": 8, "train.micro_batch_size": 2}
    for rank in ranks("events", tree(changes, dp_replicate=2, dp_shard=2)):
        (last,) = marks(rank, "backward 0", "forward")
        assert rank["micro_batches"] == 1
        assert all(e["launched"] > last for e in entries(rank, "fsdp_reduce_scatter"))
    changes = {"train.batch_size": 8, "train.micro_batch_size": 1}
    for rank in ranks("events", tree(changes, dp_replicate=2, dp_shard=2)):
        assert rank["micro_batches"] == 2
        (last,) = marks(rank, "backward 1", "forward")
        reduced, summed = entries(rank, "fsdp_reduce_scatter"), entries(rank, "fsdp_all_reduce")
        # A unit a layer and one for its experts, one for the embedding, one for the rest.
        assert Counter(e["axis"] for e in reduced) == {"fsdp": len(rank["layers"]) + 2, "efsdp": 1}
        assert min(e["launched"] for e in reduced) > last
        assert len(summed) == len(reduced)
        assert {e["axis"] for e in summed} == {"dp_replicate"}


def test_a_recording_ends_and_the_next_begins_empty(ranks, tree):
    """A step between the two, that nobody records, is in neither."""
    changes = {"model.pattern": "M*", "train.batch_size": 2}
    first, second = ranks("recordings", tree(changes, sp=2))[0]
    assert first == second
    assert first
