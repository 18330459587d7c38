"""The model card: README.md with the run's facts and how to load the model."""

from dataclasses import dataclass
from pathlib import Path

from ... import __version__
from ...data.tokenizer.interface import Kind
from ..config import Config, ModelConfig
from ..model import Hybrid
from .config import LEAST_TRANSFORMERS, notes

__all__ = ["Facts", "model_card"]


@dataclass(frozen=True)
class Facts:
    """What a card says of a run."""

    name: str
    """Of the exported folder."""
    model: ModelConfig
    training: Config | None
    """None of a model that was imported and not trained."""
    origin: str | None
    """The folder that the weights were imported from; None where they began here."""
    step: int
    tokens: int
    window: int
    """The longest it was trained on, in tokens; 0 without a training."""
    loss: float | None
    """Of the last step's batch, nats a token; None where the run's metrics lack that step."""
    validation_loss: float | None
    parameters: int
    active_parameters: int
    """That a token meets: all but the experts it is not sent to."""
    dtype: str
    tokenizer: Kind | None

    @staticmethod
    def count(model: Hybrid) -> tuple[int, int]:
        """All parameters, and those that a token meets; tied embeddings count once."""
        total = sum(parameter.numel() for parameter in model.parameters())
        moe = model.config.moe
        if moe is None:
            return total, total
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        return total, total - routed + routed * moe.top_k // moe.num_experts


def model_card(facts: Facts) -> str:
    """README.md; the same facts give the same bytes."""
    sections = [
        _front_matter(facts),
        f"# {facts.name}",
        f"A hybrid language model, {_history(facts)} and written in transformers' own `nemotron_h` "
        "format: it loads without remote code.",
        _table(facts),
        "## Load it",
        f"transformers {LEAST_TRANSFORMERS} or later reads it right; versions 5 before that draw some of the "
        "weights anew after loading (transformers#45591).",
        f"```python\n{_example(facts)}\n```",
        "## Good to know",
        "\n".join(f"- {line}" for line in _hints(facts)),
        f"## Licence\n\n{_licence(facts)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: Facts) -> str:
    tags = ["plait", "nemotron_h", *(["mamba2"] if "M" in facts.model.layers else [])]
    tags += ["moe"] if "E" in facts.model.layers else []
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _history(facts: Facts) -> str:
    if facts.origin is None:
        return "pretrained with plait"
    begun = f"imported into plait from `{facts.origin}`"
    return f"{begun}, trained on" if facts.training else f"{begun}, its weights unchanged,"


def _licence(facts: Facts) -> str:
    if facts.origin is None:
        return "The owner of this model has not stated one yet."
    return f"That of `{facts.origin}` holds for what came from there; look for it with that model."


def _table(facts: Facts) -> str:
    model = facts.model
    active = f", {facts.active_parameters:,} of them a token" if "E" in model.layers else ""
    exact = "; A_log, D, dt_bias and the routers float32" if facts.training else ""
    rows = {
        "Layers": f"`{model.layers}` (M Mamba-2, * attention, - MLP, E experts)",
        "Parameters": f"{facts.parameters:,}{active}",
        "Vocabulary": f"{model.vocab_size:,}",
        **_training_rows(facts),
        "Loss": _nats(facts.loss),
        "Validation loss": _nats(facts.validation_loss),
        "Weights": facts.dtype + exact,
        "Exported by": f"plait {__version__}",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _training_rows(facts: Facts) -> dict[str, str]:
    training = facts.training
    if training is None:
        return {}
    return {
        "Trained on": f"{facts.tokens:,} tokens in {facts.step:,} of {training.train.steps:,} steps",
        # Not whole paths: a card is for the world, and they are of one machine.
        "Data": ", ".join(
            f"`{'/'.join(Path(prefix).parts[-2:])}`" for prefix in training.shards(facts.tokens)
        ),
        "Window": f"{facts.window:,} tokens",
    }


def _nats(loss: float | None) -> str:
    return f"{loss:.4f} nats a token" if loss is not None else ""


def _example(facts: Facts) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{facts.name}", dtype="{facts.dtype}")']
    if facts.tokenizer is None:
        return "\n".join(lines)
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")',
        'inputs = tokenizer("The ", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
    ]
    return "\n".join(lines)


def _hints(facts: Facts) -> list[str]:
    model, hints = facts.model, []
    if facts.tokenizer == "huggingface":
        hints.append("The tokenizer's files are those that the model was trained with, as they came.")
    elif facts.tokenizer == "sentencepiece":
        hints.append(
            "The tokenizer gives the ids of the sentencepiece model it was made from (`tokenizer.model`), "
            "adds no token of its own, and reads the name of a special token in a text as plain text."
        )
    else:
        hints.append("The run has no tokenizer, so there is none here: the model speaks in ids.")
    if facts.training and facts.dtype == "bfloat16" and set("ME") & set(model.layers):
        hints.append(
            "A_log, D, dt_bias and the routers are float32 in the files. Loaded in bfloat16, transformers "
            'rounds these too, all but the routers\' bias; with `dtype="float32"` they stay what they are.'
        )
    if "M" in model.layers and model.mamba is not None and model.mamba.num_groups > 1:
        hints.append(
            f"vLLM's tensor parallel degree must divide the {model.mamba.num_groups} groups of the Mamba-2 "
            "layers."
        )
    window = "; the window is what it was trained on" if facts.training else ""
    hints.append(f"Positions are not encoded, so no length is out of bounds{window}.")
    return hints + [f"`{key}`{rest}" for key, rest in map(_key_first, notes(model))]


def _key_first(note: str) -> tuple[str, str]:
    key, _, rest = note.partition(" ")
    return key, f" {rest}"
