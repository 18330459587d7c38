"""Generation: what the model's forward says, for every row as if it were alone."""

import pytest
import torch

from plait.pretrain.config_file import parse_config
from plait.pretrain.generation import GREEDY, Sampling, collect, decode
from plait.pretrain.model import Hybrid, Packing, build_model

PROMPTS = [[7, 3, 11, 9, 30, 2, 8, 14, 22, 5, 41, 6, 17, 19, 4, 33, 12, 10, 25], [5], [40, 41], [9] * 7]
"""Shorter than the convolution's taps, and longer than a chunk."""


def model_of(tiny, pattern="M*-EM", dtype=torch.float64, **attention) -> Hybrid:
    tiny["model"]["pattern"] = pattern
    tiny["model"]["attention"] |= attention
    model = build_model(parse_config(tiny, "test").model, seed=5, dtype=dtype)
    with torch.no_grad():
        # As initialised, the layers add so little that a forgotten state would not show.
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.weight", "_proj")):
                parameter *= 4
    return model


def by_forward(model: Hybrid, prompt: list[int], count: int) -> list[int]:
    """Greedy ids, each by a forward over all before it."""
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            hidden, _ = model(tokens, Packing(torch.arange(len(ids))[None], None))
            ids.append(int(model.logits(hidden[:, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", [{}, {"rope_theta": 1e4, "qk_norm": True}])
def test_caches_give_the_logits_of_the_forward(tiny, attention):
    model = model_of(tiny, **attention)
    tokens = torch.randint(320, (2, 45))
    places = torch.arange(45).expand(2, -1)
    with torch.no_grad():
        expected = model.logits(model(tokens, Packing(places, None))[0])
        hidden, caches = model.prefill(tokens[:, :20], Packing(places[:, :20], None), 45)
        got = [model.logits(hidden)]
        for t in range(20, 45):
            got.append(model.logits(model.step(tokens[:, t], places[:, t], caches)))
    torch.testing.assert_close(torch.stack(got, 1), expected[:, 19:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", [{}, {"rope_theta": 1e4, "qk_norm": True}])
@pytest.mark.parametrize("pattern", ["M", "*", "M*-EM"])
def test_greedy_rows_of_any_lengths_are_the_forward_alone(tiny, pattern, attention):
    model = model_of(tiny, pattern, **attention)
    rows = collect(decode(model, PROMPTS, max_tokens=30))
    assert rows == [by_forward(model, prompt, 30) for prompt in PROMPTS]
    # Else a model that says the same whatever it saw would pass.
    assert len({tuple(row) for row in rows}) == len(rows)


def test_a_ragged_row_has_the_logits_that_it_has_alone(tiny):
    """Through every step, whatever stands beside it."""
    from plait.pretrain.generation.decoding import pad

    model = model_of(tiny, rope_theta=1e4)
    after = torch.randint(320, (len(PROMPTS), 12))

    def logits(prompts, following):
        tokens, packing = pad(prompts, torch.device("cpu"))
        hidden, caches = model.prefill(tokens, packing, tokens.shape[1] + 12)
        places = packing.positions_BL[:, -1]
        outputs = [model.logits(hidden)]
        for t in range(12):
            outputs.append(model.logits(model.step(following[:, t], places + t + 1, caches)))
        return torch.stack(outputs, 1)

    with torch.no_grad():
        together = logits(PROMPTS, after)
        for row, prompt in enumerate(PROMPTS):
            alone = logits([prompt], after[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-10)


def test_a_prompt_may_be_longer_than_the_trained_window(tiny):
    window = tiny["data"]["seq_len"]
    for theta in (None, 1e4):
        model = model_of(tiny, rope_theta=theta)
        prompt = torch.randint(320, (2 * window + 3,)).tolist()
        assert collect(decode(model, [prompt], max_tokens=4))[0] == by_forward(model, prompt, 4)


def test_a_row_ends_before_the_end_of_a_document_and_the_others_go_on(tiny):
    model = model_of(tiny)
    whole = collect(decode(model, PROMPTS, max_tokens=20))
    end = whole[0][6]
    cut = [row[: row.index(end)] if end in row else row for row in whole]
    assert len(cut[0]) <= 6 < max(map(len, cut))
    assert collect(decode(model, PROMPTS, max_tokens=20, end_of_document=end)) == cut
    steps = list(decode(model, PROMPTS[:1], max_tokens=20, end_of_document=end))
    assert len(steps) == len(cut[0]) + 1
    assert steps[-1] == [None]


def test_ids_beyond_the_tokenizer_are_never_chosen(tiny):
    model = model_of(tiny)
    with torch.no_grad():
        model.head_weight[300:] *= 100
    assert max(collect(decode(model, PROMPTS, max_tokens=8))[0]) >= 300
    for sampling in (GREEDY, Sampling(temperature=2.0)):
        rows = collect(decode(model, PROMPTS, max_tokens=8, vocab_size=300, sampling=sampling))
        assert max(map(max, rows)) < 300


def test_samples_follow_from_prompt_and_seed_alone(tiny):
    model = model_of(tiny)

    def rows(prompts, **options):
        return collect(decode(model, prompts, max_tokens=12, sampling=Sampling(**options)))

    together = rows(PROMPTS, seed=3)
    assert together == rows(PROMPTS, seed=3)
    assert together != rows(PROMPTS, seed=4)
    assert [rows([prompt], seed=3)[0] for prompt in PROMPTS] == together
    assert rows(PROMPTS[::-1], seed=3) == together[::-1]
    twice = rows([PROMPTS[0], PROMPTS[0]], seed=3)
    assert twice[0] == together[0] != twice[1]


def test_bf16_is_near_fp32(tiny):
    model = model_of(tiny, "M*-M", dtype=torch.float32)
    tokens, places = torch.randint(320, (2, 30)), torch.arange(30).expand(2, -1)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, caches = model.prefill(tokens[:, :20], Packing(places[:, :20], None), 30, dtype)
        for t in range(20, 30):
            hidden = model.step(tokens[:, t], places[:, t], caches, dtype)
        assert hidden.dtype == dtype
        logits[dtype] = model.logits(hidden).detach().float()
    error = (logits[torch.bfloat16] - logits[torch.float32]).abs().max() / logits[torch.float32].abs().max()
    # 8 bits of mantissa through four layers.
    assert error < 0.05


@pytest.mark.parametrize("prompts", [[], [[]], [[3], []]])
def test_a_prompt_has_at_least_one_id(tiny, prompts):
    with pytest.raises(ValueError, match="without ids"):
        decode(model_of(tiny, "M"), prompts, max_tokens=3)


def test_at_least_one_token_is_asked_for(tiny):
    with pytest.raises(ValueError, match="max_tokens = 0"):
        decode(model_of(tiny, "M"), PROMPTS, max_tokens=0)
