"""A user's mistakes: each ends in its one line on standard error, and exit status 2."""

import shutil
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def plait(plait):
    """Run the command line; returns the exit status and what stood on standard error."""

    def run(*words) -> tuple[int, str]:
        code, _, err = plait(*words)
        return code, err

    return run


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    return file


def assert_line(result, expected, **paths):
    code, text = result
    for name, path in paths.items():
        text = text.replace(str(path), name)
    assert (code, text) == (2, f"plait: error: {expected}\n")


OVERRIDES = {
    "a misspelt key": (
        "train.step=3",
        "train.step=3: train.step is not a key; did you mean train.steps?",
    ),
    "a key of another section": (
        "model.d_state=3",
        "model.d_state=3: model.d_state is not a key; did you mean model.mamba.d_state?",
    ),
    "no override at all": (
        "faster",
        "'faster' is no override; write key=value, such as train.steps=100",
    ),
    "a word for a number": (
        "train.steps=many",
        "CONFIG: train.steps = 'many': give a valid integer",
    ),
    "a fraction of a step": (
        "train.steps=2.5",
        "CONFIG: train.steps = 2.5: give a valid integer",
    ),
    "a negative rate": (
        "optim.lr=-1.0",
        "CONFIG: optim.lr = -1.0: give greater than 0",
    ),
    "a dtype that is none": (
        "train.dtype=fp32",
        "CONFIG: train.dtype = 'fp32': give 'bfloat16', 'float32' or 'float64'",
    ),
    "an unknown letter": (
        "model.pattern=M*Q",
        "CONFIG: model.pattern = 'M*Q': letter 'Q' at layer 2 is unknown; "
        "use M (Mamba-2), * (attention), - (MLP), E (experts)",
    ),
    "a bracket without its count": (
        "model.pattern=[M*]",
        "CONFIG: model.pattern = '[M*]': '[M*]' has no count; write '[M*]xN'",
    ),
    "a letter without its section": (
        "model.mlp=null",
        "CONFIG: model.pattern = 'M*-E' has the letter '-' but model.mlp is not set; "
        "add that section or drop the letter",
    ),
    "groups that do not divide the heads": (
        "model.mamba.num_groups=3",
        "CONFIG: model.mamba.num_groups = 3 does not divide model.mamba.num_heads = 4; choose one of 1, 2, 4",
    ),
    "kv heads that do not divide the heads": (
        "model.attention.num_kv_heads=3",
        "CONFIG: model.attention.num_kv_heads = 3 does not divide model.attention.num_heads = 4; "
        "choose one of 1, 2, 4",
    ),
    "more choices than experts": (
        "model.moe.top_k=5",
        "CONFIG: model.moe.top_k = 5 exceeds model.moe.num_experts = 4; choose at most 4",
    ),
    "groups that do not divide the experts": (
        "model.moe.num_groups=3",
        "CONFIG: model.moe.num_groups = 3 does not divide model.moe.num_experts = 4; choose one of 1, 2, 4",
    ),
    "more groups of experts than there are": (
        "model.moe.top_k_groups=2",
        "CONFIG: model.moe.top_k_groups = 2 exceeds model.moe.num_groups = 1; choose at most 1",
    ),
    "more choices than experts in the groups": (
        "model.moe.num_groups=4",
        "CONFIG: model.moe.top_k = 2 exceeds what can be chosen, 1, with "
        "model.moe.top_k_groups = 1 of 4 groups; raise top_k_groups or lower top_k",
    ),
    "a layout of many ranks": (
        "parallel.tp=2",
        "parallel: tp 2 needs 2 ranks but 1 was started; start 2 ranks with plait launch local or torchrun, "
        "or change parallel.*",
    ),
    "a layout that the heads refuse": (
        "parallel.tp=3",
        "CONFIG: parallel.tp = 3 does not divide model.mamba.num_heads = 4; layouts of 3 ranks that work: "
        "sp 3; or dp_shard 3; or dp_replicate 3",
    ),
    "experts on more ranks than there are": (
        "parallel.ep=2",
        "CONFIG: parallel.ep = 2 does not divide dp_shard x sp x tp = 1; "
        "layouts of 1 ranks that work: one rank",
    ),
    "ranks that do not divide the experts": (
        "parallel={sp: 3, ep: 3}",
        "CONFIG: parallel.ep = 3 does not divide model.moe.num_experts = 4; layouts of 3 ranks that work: "
        "sp 3; or dp_shard 3; or dp_replicate 3",
    ),
    "ranks of experts where there are none": (
        ("model.pattern=M*-", "parallel={sp: 2, ep: 2}"),
        "CONFIG: parallel.ep = 2 but model.pattern = 'M*-' has no experts; layouts of 2 ranks that work: "
        "sp 2; or tp 2; or dp_shard 2",
    ),
    "a warmup longer than the run": (
        "optim.warmup_steps=100",
        "CONFIG: optim.warmup_steps = 100 exceeds train.steps = 12; lower it",
    ),
    "a vocabulary smaller than the tokenizer's": (
        "model.vocab_size=300",
        "model.vocab_size = 300 has fewer rows than the tokenizer of CORPUS/train has ids; "
        "set model.vocab_size = 320 or more",
    ),
    "a window longer than the corpus": (
        "data.seq_len=1000000",
        "CORPUS/train: TOKENS tokens, fewer than one window of data.seq_len + 1 = 1000001; "
        "shorten data.seq_len or bring a larger corpus",
    ),
    "shards that are not there": (
        "data.blend={nowhere/train: 1.0}",
        "nowhere/train.bin: no such file; shards are named by their path without .bin and .idx",
    ),
    "a GPU that is not there": (
        "train.device=cuda",
        "train.device = cuda but torch sees no GPU here; set train.device = cpu",
    ),
}


@pytest.mark.parametrize("mistake", OVERRIDES)
def test_a_wrong_override(mistake, plait, config, corpus, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    overrides, line = OVERRIDES[mistake]
    overrides = (overrides,) if isinstance(overrides, str) else overrides
    tokens = (corpus / "train.bin").stat().st_size // 2
    result = plait("train", config, *overrides)
    assert_line(result, line.replace("TOKENS", str(tokens)), CONFIG=config, CORPUS=corpus)


def test_a_misspelt_key_in_the_file(plait, tiny, config):
    tiny["model"]["mamba"]["num_head"] = tiny["model"]["mamba"].pop("num_heads")
    config.write_text(yaml.dump(tiny))
    line = "CONFIG: model.mamba.num_heads is not set; add it (and 1 more)"
    assert_line(plait("config", "show", config), line, CONFIG=config)
    tiny["model"]["mamba"]["num_heads"] = 4
    config.write_text(yaml.dump(tiny))
    line = "CONFIG: model.mamba.num_head is not a key; did you mean model.mamba.num_heads?"
    assert_line(plait("config", "show", config), line, CONFIG=config)


def test_a_config_that_is_not_there(plait):
    assert_line(plait("train", "dmo.yaml"), "dmo.yaml: no such config file; did you mean configs/demo.yaml?")


def test_a_config_that_is_a_list(plait, config):
    config.write_text("- a\n- b\n")
    line = "CONFIG: holds list, not sections of keys such as 'model:'"
    assert_line(plait("train", config), line, CONFIG=config)


def test_a_run_folder_that_is_a_file(plait, config, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    line = "run.dir = RUN is a file; choose another folder"
    assert_line(plait("train", config), line, RUN=tmp_path / "run")


def test_a_shard_cut_short(plait, config, corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    size = (copy / "train.bin").stat().st_size
    with (copy / "train.bin").open("r+b") as file:
        file.truncate(size - 10)
    code, text = plait("train", config, f"data.blend={{{copy / 'train'}: 1.0}}")
    assert code == 2
    assert text.startswith(f"plait: error: {copy / 'train.bin'}: {size - 10} bytes")
    assert text.count("\n") == 1


def test_a_foreign_checkpoint(plait, config, tmp_path):
    assert plait("train", config, "train.stop_at=1")[0] == 0
    line = (
        "RUN/checkpoints/step-00000001: saved with another model: model.d_model = 32 then and 48 now; "
        "restore those keys, or choose another run.dir"
    )
    assert_line(plait("train", config, "model.d_model=48"), line, RUN=tmp_path / "run")


def test_a_checkpoint_cut_short_and_no_other(plait, config, tmp_path):
    assert plait("train", config, "train.stop_at=1")[0] == 0
    (file,) = (tmp_path / "run/checkpoints/step-00000001").glob("rank-*.bin")
    file.write_bytes(file.read_bytes()[:-100])
    code, text = plait("train", config)
    *warnings, error = text.splitlines()
    assert code == 2
    assert any("step-00000001" in warning for warning in warnings)
    assert error == (
        f"plait: error: {tmp_path}/run/checkpoints: none of its checkpoints is whole, and a new run would "
        "bury them; move the folder away to begin anew"
    )


def test_a_wrong_tokenizer(plait, config, corpus, tmp_path):
    from plait.data.build import build
    from plait.data.tokenizer import train_tokenizer

    assert plait("train", config, "train.stop_at=1")[0] == 0
    texts = [f"other words {i} make other pieces\n" * 40 for i in range(9)]
    other = train_tokenizer(texts, tmp_path / "other.model", vocab_size=300)
    build(tmp_path / "other", texts, other, validation=1)
    line = (
        "OTHER/train: built with another tokenizer than the one of RUN; "
        "rebuild the corpus with that one, or choose another run.dir"
    )
    result = plait("train", config, f"data.blend={{{tmp_path / 'other/train'}: 1.0}}", "data.validation=null")
    assert_line(result, line, RUN=tmp_path / "run", OTHER=tmp_path / "other")


def test_an_empty_corpus(plait, corpus, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    code, text = plait(
        "data",
        "build",
        tmp_path / "out",
        "--corpus",
        tmp_path / "empty.jsonl",
        "--tokenizer",
        corpus / "tokenizer.model",
    )
    assert code == 2
    assert text.startswith(f"plait: error: {tmp_path / 'empty.jsonl'}: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_jsonl_without_the_key(plait, corpus, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    code, text = plait(
        "data",
        "build",
        tmp_path / "out",
        "--corpus",
        tmp_path / "c.jsonl",
        "--tokenizer",
        corpus / "tokenizer.model",
    )
    assert code == 2
    assert text.startswith(f"plait: error: {tmp_path / 'c.jsonl'}:2: ")
    assert text.count("\n") == 1


def test_two_processes_in_one_folder(plait, config, tmp_path):
    from plait.pretrain.run_folder import RunFolder

    with RunFolder(tmp_path / "run").lock():
        line = "run.dir = RUN: another process is training here; wait for it, or choose another folder"
        assert_line(plait("train", config), line, RUN=tmp_path / "run")


def test_more_ranks_than_the_layout(plait, config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = (
        "parallel: one rank needs 1 rank but 2 were started; start 1 rank with plait launch local or "
        "torchrun, or change parallel.*"
    )
    assert_line(plait("train", config), line)


def test_plot_of_no_run(plait, tmp_path):
    line = "NONE/metrics.jsonl: no metrics are here; name the folder of a run that has begun"
    assert_line(plait("plot", tmp_path / "none"), line, NONE=tmp_path / "none")


def test_a_loss_that_is_no_number(plait, config, tmp_path):
    code, text = plait("train", config, "optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every=1")
    assert code == 2
    assert text.startswith(
        "plait: error: step 2: the loss is nan and the gradient's norm nan; lower optim.lr"
    )
    assert text.count("\n") == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
