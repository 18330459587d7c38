"""The model that a nemotron_h config.json describes, in either spelling: the inverse of `config.py`.

NVIDIA's own files say the layers as `hybrid_override_pattern`; what transformers 5 saves says them as
`layers_block_type`, and an infinity as an object. What counts is what transformers computes: keys that
its model does not read are not read here.
"""

import json
import math
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig
from ..pattern import expand
from .config import LARGEST_FLOAT32, NO_FLOOR

__all__ = ["read_model_config"]

DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "time_step_min": 0.001,
    "time_step_limit": [0.0, math.inf],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": None,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "quantization_config": None,
}
"""What transformers takes where config.json is silent."""

OTHER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_limit": "time_step_limit",
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
}
"""Older names, which win over the newer ones in transformers too."""

LETTERS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}

LARGEST_COUNT = 2**24
"""No dimension of a model is larger; a product of a few of them still fits into 64 bits."""


def read_model_config(tree: dict[str, Any], path: Path) -> tuple[ModelConfig, list[str]]:
    """The model, and what its owner should know, a line each.

    Args:
        tree: config.json.
        path: where it came from; opens an error's line.

    Raises:
        UserError: the first key that is missing, of the wrong kind, or that plait's layers do not
            compute; its value and what fits.
    """
    keys = _Keys(tree, path)
    keys.expect("model_type", "nemotron_h", "only models of this type come in")
    keys.expect("quantization_config", None, "quantized weights cannot be trained")
    layers = _layers(keys)
    model = ModelConfig(
        pattern=layers,
        d_model=keys.count("hidden_size"),
        vocab_size=keys.count("vocab_size"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        norm_eps=keys.number("layer_norm_epsilon", above=0, below=1),
        mamba=_mamba(keys) if "M" in layers else None,
        attention=_attention(keys) if "*" in layers else None,
        mlp=_mlp(keys) if "-" in layers else None,
        moe=_moe(keys) if "E" in layers else None,
    )
    return model, _notes(keys, model)


class _Keys:
    """The keys of a config.json, each asked for by the kind of value it must have."""

    def __init__(self, tree: dict[str, Any], path: Path) -> None:
        renamed = {now: tree[then] for then, now in OTHER_NAMES.items() if then in tree}
        if "attention_head_dim" in tree:
            # NVIDIA's first releases call it so; where both stand, transformers reads the other.
            tree = {"head_dim": tree["attention_head_dim"], **tree}
        self.tree = DEFAULTS | tree | renamed
        self.path = path

    def get(self, key: str) -> Any:
        if key not in self.tree:
            raise UserError(f"{self.path}: {key} is not set; bring the config.json of these weights")
        return self.tree[key]

    def expect(self, key: str, fitting: Any, reason: str) -> None:
        value = self.get(key)
        if value != fitting or isinstance(value, bool) != isinstance(fitting, bool):
            raise self.misfit(key, reason, _shown(fitting))

    def count(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
            raise self.wrong(key, "a whole number, 1 or more")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def number(self, key: str, *, above: float, below: float = math.inf) -> float:
        value = _float(self.get(key))
        if value is None or not above < value < below:
            raise self.wrong(key, f"a number between {above:g} and {below:g}")
        return value

    def wrong(self, key: str, wanted: str) -> UserError:
        return UserError(f"{self.path}: {key} = {_shown(self.get(key))}: give {wanted}")

    def misfit(self, key: str, reason: str, fitting: str) -> UserError:
        return UserError(
            f"{self.path}: {key} = {_shown(self.get(key))} does not fit: {reason}; "
            f"only {key} = {fitting} comes in"
        )


def _layers(keys: _Keys) -> str:
    pattern, types = (keys.tree.get(key) for key in ("hybrid_override_pattern", "layers_block_type"))
    if pattern is None and types is None:
        raise UserError(
            f"{keys.path}: names no layers; it needs hybrid_override_pattern or layers_block_type"
        )
    found = None
    if types is not None:
        known = isinstance(types, list) and all(isinstance(t, str) and t in LETTERS for t in types)
        if not known or not types:
            raise keys.wrong("layers_block_type", f"a list of {', '.join(LETTERS)}")
        found = "".join(LETTERS[kind] for kind in types)
    if pattern is not None:
        if not isinstance(pattern, str) or not set(pattern) <= set("M*-E"):
            raise keys.wrong("hybrid_override_pattern", "a text of the letters M, *, - and E")
        if found is not None and found != pattern:
            raise UserError(
                f"{keys.path}: hybrid_override_pattern = {pattern} and layers_block_type, which is {found}, "
                "name other layers; drop the one that is wrong"
            )
        found = pattern
    assert found is not None
    try:
        expand(found)
    except ValueError as error:
        raise UserError(f"{keys.path}: its layers do not fit: {error}") from None
    said = keys.tree.get("num_hidden_layers")
    if said is not None and said != len(found):
        raise UserError(
            f"{keys.path}: num_hidden_layers = {_shown(said)}, and its pattern {found} names {len(found)}; "
            f"set num_hidden_layers = {len(found)}"
        )
    return found


def _mamba(keys: _Keys) -> MambaConfig:
    keys.expect("mamba_hidden_act", "silu", "the convolution is followed by SiLU")
    keys.expect("use_bias", False, "no projection has a bias")
    keys.expect("mamba_proj_bias", False, "no projection has a bias")
    keys.expect("use_conv_bias", True, "the convolution has a bias")
    heads, groups, taps = (keys.count(key) for key in ("mamba_num_heads", "n_groups", "conv_kernel"))
    if heads % groups:
        raise keys.wrong("n_groups", f"a divisor of mamba_num_heads = {heads}")
    if not 2 <= taps <= 8:
        raise keys.wrong("conv_kernel", "2 to 8")
    floor = keys.number("time_step_min", above=-math.inf)
    return MambaConfig(
        num_heads=heads,
        head_dim=keys.count("mamba_head_dim"),
        d_state=keys.count("ssm_state_size"),
        num_groups=groups,
        d_conv=taps,
        chunk_size=keys.count("chunk_size"),
        # transformers clamps here, whatever time_step_limit says, and without an upper bound.
        dt_limit=(floor if floor > NO_FLOOR else 0.0, math.inf),
    )


def _attention(keys: _Keys) -> AttentionConfig:
    keys.expect("attention_bias", False, "no projection has a bias")
    keys.expect("sliding_window", None, "attention sees the whole text before a token")
    heads = keys.count("num_attention_heads")
    kv_heads = heads if keys.get("num_key_value_heads") is None else keys.count("num_key_value_heads")
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=keys.count("head_dim"))


def _mlp(keys: _Keys) -> MLPConfig:
    _check_activation(keys)
    return MLPConfig(d_ff=keys.count("intermediate_size"))


def _moe(keys: _Keys) -> MoEConfig:
    _check_activation(keys)
    experts, chosen = keys.count("n_routed_experts"), keys.count("num_experts_per_tok")
    if chosen > experts:
        raise keys.wrong("num_experts_per_tok", f"at most n_routed_experts = {experts}")
    groups, chosen_groups = keys.count("n_group"), keys.count("topk_group")
    if experts % groups:
        raise keys.wrong("n_group", f"a divisor of n_routed_experts = {experts}")
    if chosen_groups > groups:
        raise keys.wrong("topk_group", f"at most n_group = {groups}")
    reachable = experts // groups * chosen_groups
    if chosen > reachable:
        raise keys.wrong(
            "num_experts_per_tok",
            f"at most {reachable}, the experts in topk_group = {chosen_groups} of {groups} groups",
        )
    return MoEConfig(
        num_experts=experts,
        top_k=chosen,
        num_groups=groups,
        top_k_groups=chosen_groups,
        d_expert=keys.count("moe_intermediate_size"),
        d_shared=keys.count("moe_shared_expert_intermediate_size"),
        norm_top_k=keys.flag("norm_topk_prob"),
        scaling=keys.number("routed_scaling_factor", above=0),
        latent_dim=None if keys.get("moe_latent_size") is None else keys.count("moe_latent_size"),
    )


def _check_activation(keys: _Keys) -> None:
    keys.expect("mlp_hidden_act", "relu2", "MLPs and experts without a gate square a ReLU")
    keys.expect("mlp_bias", False, "no projection has a bias")


def _notes(keys: _Keys, model: ModelConfig) -> list[str]:
    found = []
    if model.mamba is not None:
        low, limit = model.mamba.dt_limit[0], keys.get("time_step_limit")
        if low > 0:
            found.append(
                f"time_step_min = {low:g}: step sizes are clamped from below there, as transformers does; "
                "vLLM and Megatron-LM do not clamp"
            )
        if not _says_no_more(limit, low):
            found.append(
                f"time_step_limit = {_shown(limit)}: transformers clamps at time_step_min alone, and so "
                "does plait"
            )
    return found


def _says_no_more(limit: Any, low: float) -> bool:
    """Whether a time_step_limit holds no other bound than time_step_min; files write infinity as they can."""
    bounds = [_float(bound) for bound in limit] if isinstance(limit, list) else []
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return False
    return bounds[0] in (0.0, low) and bounds[1] >= LARGEST_FLOAT32


def _float(value: Any) -> float | None:
    """A number, also where transformers wrote an infinity as an object."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        try:
            return float(value["__float__"])
        except (TypeError, ValueError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
