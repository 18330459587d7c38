"""Evaluation: training's forward over the same windows, whatever the batch; bytes, places, sources."""

import json
import math
from dataclasses import replace

import pytest
import torch

from plait.data.build import build
from plait.data.plan import Plan, open_blend
from plait.data.tokenizer import load_tokenizer
from plait.data.window import IGNORE, batch
from plait.errors import UserError
from plait.kernels.cross_entropy.eager import CHUNK_BYTES
from plait.pretrain.callbacks import Checkpointing, Evaluation, MetricsFile
from plait.pretrain.config_file import parse_config
from plait.pretrain.evaluation import evaluate, total
from plait.pretrain.evaluation_report import evaluate_run, write_report
from plait.pretrain.loading import load_run
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.model import Packing, build_model
from plait.pretrain.trainer import Trainer

SEQ_LEN = 30


@pytest.fixture
def model(tiny):
    return build_model(parse_config(tiny, "test").model, seed=5, dtype=torch.float64)


@pytest.fixture
def prefix(corpus):
    return str(corpus / "validation")


def measure(model, prefix, **options):
    defaults = {"seq_len": SEQ_LEN, "windows": 7, "batch_size": 3, "isolate_documents": True}
    return evaluate(model, prefix, **(defaults | options), dtype=torch.float64)


@pytest.mark.parametrize("isolate", [True, False])
def test_it_is_the_loss_of_training_over_the_same_windows(model, prefix, isolate):
    sources, shards = open_blend({prefix: 1.0})
    plan = Plan.start(sources, seed=0, seq_len=SEQ_LEN)
    arrays = batch(plan, shards, range(7), isolate_documents=isolate)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    targets = int((tensors["targets"] != IGNORE).sum())
    packing = Packing(tensors["positions"], tensors["document_ids"] if isolate else None)
    micro = MicroBatch(tensors["tokens"], tensors["targets"], packing)
    with torch.no_grad():
        parts = compute_loss(model, micro, StepCounts(targets, 7 * SEQ_LEN, 7), dtype=torch.float64)
    measured = measure(model, prefix, isolate_documents=isolate)
    assert measured.loss == pytest.approx(float(parts.cross_entropy), rel=1e-12)
    assert (measured.windows, measured.targets) == (7, targets)
    assert (targets < 7 * SEQ_LEN) == isolate


def test_places_are_those_of_the_window(model, prefix):
    sources, shards = open_blend({prefix: 1.0})
    plan = Plan.start(sources, seed=0, seq_len=SEQ_LEN)
    measured = measure(model, prefix, windows=1)
    arrays = batch(plan, shards, [0])
    tokens, packing = (
        torch.from_numpy(arrays["tokens"]),
        Packing(torch.from_numpy(arrays["positions"]), torch.from_numpy(arrays["document_ids"])),
    )
    with torch.no_grad():
        log_p = model.logits(model(tokens, packing)[0])[0].log_softmax(-1)
    for place, target in enumerate(arrays["targets"][0].tolist()):
        wanted = 0.0 if target == IGNORE else -float(log_p[place, target])
        assert float(measured.loss_sum_L[place]) == pytest.approx(wanted, abs=1e-12)
        assert int(measured.targets_L[place]) == (target != IGNORE)


@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 1 << 24])
def test_batches_and_chunks_change_nothing(model, prefix, monkeypatch, chunk_bytes):
    whole = measure(model, prefix, batch_size=7)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    for size in (1, 2, 50):
        part = measure(model, prefix, batch_size=size)
        torch.testing.assert_close(part.loss_sum_L, whole.loss_sum_L, rtol=1e-12, atol=1e-12)
        assert torch.equal(part.targets_L, whole.targets_L)


def test_more_windows_than_there_are_is_one_epoch(model, prefix):
    tokens = open_blend({prefix: 1.0})[1][prefix].num_tokens
    assert measure(model, prefix, windows=10**6).windows == (tokens - SEQ_LEN) // SEQ_LEN


def test_bits_a_byte_by_hand(tiny, corpus, tmp_path):
    """Every target costs log(vocabulary) where the head is zero; the bytes are counted here."""
    texts = ["state space é\n" * 20, "chunk token\n" * 30, "漢字 decay\n" * 15]
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    build(tmp_path / "c", texts, tokenizer, validation=1)
    prefix = str(tmp_path / "c" / "train")
    model = build_model(parse_config(tiny, "test").model, seed=5, dtype=torch.float64)
    with torch.no_grad():
        model.head_weight.zero_()
    measured = measure(model, prefix, windows=10**6)
    split = json.loads((tmp_path / "c" / "manifest.json").read_text())["splits"]["train"]
    held_in = [text for text in texts if text != _held_out(tmp_path / "c", tokenizer)]
    size = sum(len(text.encode()) for text in held_in)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in held_in)
    assert (split["text_bytes"], split["tokens"]) == (size, tokens)
    assert measured.loss == pytest.approx(math.log(320), rel=1e-12)
    assert measured.perplexity == pytest.approx(320, rel=1e-12)
    assert measured.bits_per_byte == pytest.approx(math.log2(320) * tokens / size, rel=1e-12)


def _held_out(folder, tokenizer):
    _, shards = open_blend({str(folder / "validation"): 1.0})
    (shard,) = shards.values()
    return tokenizer.decode(shard.read(0, shard.num_tokens)[0].tolist())


def test_bits_a_byte_without_a_manifest_come_from_decoding(model, corpus, tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"v.{suffix}").write_bytes((corpus / f"validation.{suffix}").read_bytes())
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    bare = str(tmp_path / "v")
    by_manifest = measure(model, str(corpus / "validation"), windows=10**6)
    decoded = measure(model, bare, windows=10**6, tokenizer=tokenizer)
    assert decoded.loss == by_manifest.loss
    # Windows leave out up to two windows of the split's tokens.
    assert decoded.bits_per_byte == pytest.approx(by_manifest.bits_per_byte, rel=0.02)
    unknown = measure(model, bare, windows=10**6)
    assert unknown.bytes_per_token is None
    assert unknown.bits_per_byte is None


def test_a_total_weighs_by_targets_and_bytes(model, corpus):
    parts = [
        measure(model, str(corpus / "validation"), windows=2),
        measure(model, str(corpus / "train"), windows=9),
    ]
    both = total(parts)
    nats = sum(part.loss * part.targets for part in parts)
    size = sum((part.bytes_per_token or math.nan) * part.targets for part in parts)
    assert both.targets == sum(part.targets for part in parts)
    assert both.loss == pytest.approx(nats / both.targets, rel=1e-12)
    assert both.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_ids_without_a_row_are_refused(tiny, prefix):
    tiny["model"]["vocab_size"] = 250
    small = build_model(parse_config(tiny, "test").model, seed=0, dtype=torch.float64)
    with pytest.raises(UserError, match=r"validation: holds the id \d+, and the model has 250 rows; name"):
        measure(small, prefix)


@pytest.fixture
def run(tiny):
    config = parse_config(tiny, "test")
    Trainer(config, [Evaluation(), MetricsFile(), Checkpointing()]).run()
    return tiny["run"]["dir"]


def test_a_run_is_evaluated_as_in_its_training(run, tiny):
    losses = {r["step"]: r.get("validation_loss") for r in read_metrics_of(run)}
    (newest,) = evaluate_run(load_run(run))
    assert newest.loss == losses[12]
    loaded = load_run(f"{run}@8", dtype="float64")
    assert (loaded.step, loaded.dtype) == (8, torch.float64)
    (exact,) = evaluate_run(loaded, batches=1)
    assert exact.windows == 4
    assert exact.loss != newest.loss


def read_metrics_of(run):
    from plait.pretrain.run_folder import RunFolder

    return read_metrics(RunFolder(run).metrics_file)


def test_a_report_is_json_and_a_picture(run, corpus, tmp_path):
    loaded = load_run(run)
    parts = evaluate_run(loaded, [str(corpus / "validation"), str(corpus / "train")])
    write_report(loaded, parts, tmp_path / "deep" / "out")
    record = json.loads((tmp_path / "deep" / "out" / "evaluation.json").read_text())
    assert record["step"] == 12
    assert [source["shards"] for source in record["sources"]] == [part.prefix for part in parts]
    first = record["sources"][0]
    pairs = zip(first["loss_by_position"], first["targets_by_position"], strict=True)
    again = sum(loss * count for loss, count in pairs if count) / first["targets"]
    assert first["loss"] == pytest.approx(again, rel=1e-12)
    assert len(first["loss_by_position"]) == record["seq_len"] == 50
    picture = (tmp_path / "deep" / "out" / "loss_by_position.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_run_that_says_no_shards_or_windows(run):
    loaded = load_run(run)
    assert loaded.config is not None
    data = loaded.config.data.model_copy(update={"validation": None})
    without = replace(loaded, config=loaded.config.model_copy(update={"data": data}))
    with pytest.raises(UserError) as error:
        evaluate_run(without)
    assert str(error.value) == f"{run}: data.validation = null, so name shards with --shards"
    with pytest.raises(UserError) as error:
        evaluate_run(replace(loaded, config=None))
    assert str(error.value) == (
        f"{run}: an imported model, and nothing says the windows to read; begin a run with "
        "checkpoint.init_from, and evaluate that"
    )


def test_the_validation_loss_does_not_depend_on_the_micro_batch(tiny, tmp_path):
    tiny["train"] |= {"steps": 1, "batch_size": 10, "dtype": "float64"}
    tiny["optim"]["warmup_steps"] = 0
    tiny["evaluate"]["batches"] = 1
    losses = []
    for size in (2, 5, 10):
        tiny["run"]["dir"] = str(tmp_path / str(size))
        tiny["train"]["micro_batch_size"] = size
        Trainer(parse_config(tiny, "test"), [Evaluation(), MetricsFile()]).run()
        losses.append(read_metrics_of(tmp_path / str(size))[-1]["validation_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-10)
