"""What of a model fits transformers' nemotron_h, and the config.json of one that does.

`nemotron_h` here is what transformers' `modeling_nemotron_h.py` computes; vLLM, llama.cpp, TensorRT-LLM
and mlx read the same folder, and where one of them differs, a note says so.
"""

import math
from collections.abc import Mapping
from typing import Any

from ... import __version__
from ...errors import UserError
from ..config import AttentionConfig, MambaConfig, ModelConfig, MoEConfig
from .tokenizer import SpecialIds

__all__ = [
    "LARGEST_FLOAT32",
    "LEAST_TRANSFORMERS",
    "MARKER",
    "NO_FLOOR",
    "check_fits",
    "config_json",
    "generation_config_json",
    "notes",
]

LEAST_TRANSFORMERS = "5.8.0"
"""Before it, transformers 5 drew dt_bias and out_proj anew after loading (transformers#45591)."""

MARKER = "exported_by"
"""The key of config.json by which an earlier export is known; no reader looks at it."""

NO_FLOOR = 1e-30
"""transformers clamps step sizes from below at `time_step_min`, and takes no zero: a softplus in fp32
that is smaller moves nothing."""

LARGEST_FLOAT32 = 3.4028234663852886e38

KERNEL_CHUNK = 128
"""Tokens a chunk where the run's own number is none that GPU kernels take: speed, never results."""


def check_fits(model: ModelConfig) -> None:
    """Refuse a model that nemotron_h does not compute.

    Raises:
        UserError: the first key that does not fit, its value, and what would.
    """
    letters = set(model.layers)
    if "M" in letters and model.mamba is not None:
        _check_mamba(model.mamba)
    if "*" in letters and model.attention is not None:
        _check_attention(model.attention)
    if "-" in letters and model.mlp is not None and model.mlp.activation != "squared_relu":
        raise _misfit("model.mlp.activation", model.mlp.activation, "its MLPs have no gate", "squared_relu")
    if "E" in letters and model.moe is not None:
        _check_moe(model.moe)


def _check_mamba(mamba: MambaConfig) -> None:
    if not math.isinf(mamba.dt_limit[1]):
        raise _misfit(
            "model.mamba.dt_limit",
            list(mamba.dt_limit),
            "it clamps step sizes from below only",
            f"[{mamba.dt_limit[0]}, .inf]",
        )


def _check_attention(attention: AttentionConfig) -> None:
    if attention.rope_theta is not None:
        raise _misfit("model.attention.rope_theta", attention.rope_theta, "it encodes no positions", "null")
    if attention.qk_norm:
        raise _misfit("model.attention.qk_norm", "true", "it has no norm on queries and keys", "false")


def _check_moe(moe: MoEConfig) -> None:
    if moe.activation != "squared_relu":
        raise _misfit("model.moe.activation", moe.activation, "its experts have no gate", "squared_relu")
    if moe.score != "sigmoid":
        raise _misfit("model.moe.score", moe.score, "its router scores by sigmoid", "sigmoid")
    if moe.num_experts < 2:
        raise _misfit("model.moe.num_experts", moe.num_experts, "its router sums two scores", "2 or more")
    if moe.d_shared < 1:
        raise _misfit(
            "model.moe.d_shared", moe.d_shared, "its E layers always have a shared expert", "1 or more"
        )


def _misfit(key: str, value: Any, reason: str, fitting: str) -> UserError:
    return UserError(f"{key} = {value} does not fit nemotron_h: {reason}; only {key} = {fitting} exports")


def notes(model: ModelConfig) -> list[str]:
    """What an owner should know of other readers than transformers, a line each."""
    found = []
    letters = set(model.layers)
    if {"-", "E"} <= letters:
        found.append(
            f"model.pattern = {model.pattern} has both - and E layers: transformers and vLLM read that, "
            "llama.cpp takes only one of the two kinds in a model"
        )
    if model.tie_embeddings:
        found.append(
            "model.tie_embeddings = true: nemotron_h ties nothing, so the one matrix is written twice, as "
            "embedding and as head; training on in transformers would let them part"
        )
    if "*" not in letters:
        found.append(
            f"model.pattern = {model.pattern} has no * layer: transformers cannot cache such a model's "
            "states, so config.json says use_cache = false, and a text is read again for each token"
        )
    if "M" in letters and model.mamba is not None:
        found += _mamba_notes(model.mamba)
    if "E" in letters and model.moe is not None and _groups(model.moe) != (1, 1):
        found.append(
            f"model.moe.top_k_groups = {model.moe.top_k_groups} of {model.moe.num_groups}: mlx takes 0 for "
            "the scores of other groups, and so sends a token there rather than to an expert whose score "
            "and bias together are below 0"
        )
    return found


def _mamba_notes(mamba: MambaConfig) -> list[str]:
    found = []
    if mamba.dt_limit[0] > 0:
        found.append(
            f"model.mamba.dt_limit = {list(mamba.dt_limit)}: transformers clamps while it reads a text, not "
            "when it goes on from a cache, so config.json says use_cache = false; vLLM never clamps"
        )
    if mamba.d_conv > 4:
        found.append(
            f"model.mamba.d_conv = {mamba.d_conv}: the causal-conv1d kernels take 2 to 4; readers that "
            "compute with them refuse this model"
        )
    return found


def config_json(
    model: ModelConfig,
    special: SpecialIds | None,
    *,
    max_positions: int,
    dtype: str,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The model's config.json: finite numbers, and keys of experts only where there are any.

    Args:
        special: the tokenizer's; None where the run has none.
        max_positions: the longest window the model was trained on. Nothing in the model depends on it;
            servers take it for the context length to offer.
        dtype: that of the files, as readers are to compute in: float32, bfloat16 or float16.
        kept: keys of the config.json that the weights came with, which stand as they were.
    """
    layers = model.layers
    # Readers want the keys of every kind of layer; those of kinds that the model lacks mean nothing.
    mamba = model.mamba or MambaConfig(num_heads=1)
    attention = model.attention or AttentionConfig(num_heads=1, num_kv_heads=1)
    moe = model.moe if "E" in layers else None
    if "-" in layers and model.mlp is not None:
        intermediate = model.mlp.d_ff
    else:
        intermediate = moe.d_expert if moe else model.d_model
    tree = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        MARKER: f"plait {__version__}",
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(layers),
        "hybrid_override_pattern": layers,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": model.norm_eps,
        "residual_in_fp32": False,
        "use_bias": False,
        "use_cache": _caches(model),
        **_token_ids(special),
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.d_state,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.d_conv,
        "chunk_size": _kernel_chunk(mamba.chunk_size),
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "mamba_ssm_cache_dtype": "float32",
        **_step_limits(mamba),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "intermediate_size": intermediate,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
    }
    return tree | (_expert_keys(moe) if moe else {}) | dict(kept or {})


def generation_config_json(
    model: ModelConfig, special: SpecialIds | None, kept: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The model's generation_config.json: where a text ends."""
    ids = _token_ids(special)
    ids |= {key: token for key, token in (kept or {}).items() if key in ids}
    tokens = {key: token for key, token in ids.items() if token is not None}
    return tokens | ({} if _caches(model) else {"use_cache": False})


def _caches(model: ModelConfig) -> bool:
    """Whether transformers goes on from its cache with the same numbers.

    It asks the cache's attention layers how long the text is, and fails where there are none; and it
    forgets the least step size.
    """
    floor = "M" in model.layers and model.mamba is not None and model.mamba.dt_limit[0] > 0
    return "*" in model.layers and not floor


def _token_ids(special: SpecialIds | None) -> dict[str, int | None]:
    """Named even where there are none: transformers' own defaults would name other tokens."""
    return {
        "bos_token_id": None,
        "eos_token_id": special.end_of_document if special else None,
        "pad_token_id": special.padding if special else None,
    }


def _step_limits(mamba: MambaConfig) -> dict[str, Any]:
    low = mamba.dt_limit[0]
    limits: dict[str, Any] = {"time_step_min": low or NO_FLOOR, "time_step_max": 0.1, "time_step_floor": 1e-4}
    # Other readers look for a lower limit here; absent, it is none.
    return limits | ({"time_step_limit": [low, LARGEST_FLOAT32]} if low else {})


def _kernel_chunk(chunk_size: int) -> int:
    power_of_two = chunk_size & (chunk_size - 1) == 0
    return chunk_size if power_of_two and 16 <= chunk_size <= 256 else KERNEL_CHUNK


def _expert_keys(moe: MoEConfig) -> dict[str, Any]:
    latent = {"moe_latent_size": moe.latent_dim} if moe.latent_dim else {}
    groups, chosen_groups = _groups(moe)
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_expert,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": moe.d_shared,
        "n_group": groups,
        "topk_group": chosen_groups,
        "norm_topk_prob": moe.norm_top_k,
        "routed_scaling_factor": moe.scaling,
        **latent,
    }


def _groups(moe: MoEConfig) -> tuple[int, int]:
    """Groups of experts and how many are chosen; 1 of 1 where the groups decide nothing.

    Readers fail at those: transformers sums two scores of a group, llama.cpp wants a group left over.
    """
    if moe.top_k_groups == moe.num_groups or moe.num_groups == moe.num_experts:
        return 1, 1
    return moe.num_groups, moe.top_k_groups
