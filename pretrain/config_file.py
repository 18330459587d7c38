"""Configs on disk: YAML in, overrides from the command line, one line for every mistake, YAML out."""

import copy
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..data.plain_file import read_plain
from ..errors import UserError
from .config import Config, ModelConfig
from .stage_config import STAGE_KEYS
from .yaml_text import read_yaml

__all__ = [
    "config_keys",
    "differing_keys",
    "dump_config",
    "dump_model",
    "find_config",
    "flatten_config",
    "load_config",
    "override_config",
    "parse_config",
    "parse_model",
]

MOST_BYTES = 64 << 20
SHIPPED = Path(__file__).resolve().parent.parent / "configs"


TEXT_KEYS = ("run.dir", "model.pattern", "data.validation", "checkpoint.init_from")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config file, apply ``key=value`` overrides in order, and check the whole.

    A file may name others under ``include``, relative to itself; what it says itself wins over them.
    What it leaves out of ``model`` is, with ``checkpoint.init_from``, that of the run it names.

    Raises:
        UserError: no such file, not YAML, an unknown key, a value of the wrong kind, or a
            combination that cannot work.
    """
    path = find_config(path)
    tree = _read(path, ())
    for override in overrides:
        _apply(tree, override)
    return parse_config(_with_inherited_model(tree), str(path))


def override_config(tree: Mapping[str, Any], overrides: Iterable[str], origin: str) -> Config:
    """Check a tree of keys with ``key=value`` overrides applied to it.

    Args:
        origin: where the tree came from; opens the error's line.

    Raises:
        UserError: as for :func:`load_config`.
    """
    tree = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, origin)


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name among the configs that plait ships."""
    path = Path(path)
    name = path.as_posix().removeprefix("configs/")
    for candidate in (path, SHIPPED / name, SHIPPED / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    near = _nearest(path.stem, [p.stem for p in SHIPPED.glob("*.yaml")])
    hint = f"did you mean configs/{near}.yaml?" if near else f"plait's own are in {SHIPPED}"
    raise UserError(f"{path}: no such config file; {hint}")


def parse_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Check a tree of keys.

    Args:
        tree: as YAML or JSON gives it.
        origin: where it came from; opens the error's line.

    Raises:
        UserError: the first mistake, in one line that names key, value and remedy.
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        details = error.errors(include_url=False)
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise UserError(f"{origin}: {_explain(details[0])}{more}") from None


def parse_model(tree: Mapping[str, Any], origin: str) -> ModelConfig:
    """The ``model`` section of a tree of keys, which may lack all others: that of an imported model does.

    Raises:
        UserError: there is none, or it is none of this version of plait.
    """
    try:
        return ModelConfig.model_validate(tree["model"])
    except (KeyError, TypeError, ValidationError):
        raise UserError(
            f"{origin}: describes no model; name a run that this version of plait wrote"
        ) from None


def dump_model(model: ModelConfig) -> str:
    """A config file that holds nothing but the ``model`` section; :func:`parse_model` reads it back."""
    return yaml.dump({"model": model.model_dump(mode="json")}, sort_keys=False)


def dump_config(config: Config) -> str:
    """The config as YAML, complete with defaults; :func:`load_config` reads it back to an equal one."""
    return yaml.dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def flatten_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's tree of keys with dotted ones: ``model.mamba.num_heads``; a blend stays one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "blend":
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Keys of two configs that differ: key -> both values."""
    first, second = (flatten_config(config.model_dump(mode="json", by_alias=True)) for config in (one, other))
    return {key: (first[key], second[key]) for key in first if first[key] != second[key]}


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key a config file may hold, dotted, in order: ``model.mamba.num_heads``."""
    keys = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = _section(field.annotation)
        keys += [key, *config_keys(section, key + ".")] if section else [key]
    return keys


def _with_inherited_model(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the model that its run goes on with: its own where it has checkpoints, that of
    `checkpoint.init_from` where it is to begin."""
    source = _value_at(tree, "checkpoint", "init_from")
    if not isinstance(source, str) or not source:
        return tree
    own = _value_at(tree, "run", "dir")
    if isinstance(own, str) and any(Path(own, "checkpoints").glob("step-*")):
        source = own
    path = Path(source)
    if not path.is_dir():
        path = Path(source.rpartition("@")[0] or source)
    try:
        inherited = read_yaml(_text_of(path / "config.yaml"))
    except (OSError, yaml.YAMLError, ValueError):
        raise UserError(
            f"checkpoint.init_from = {source}: no run is here (it has no config.yaml that can be read); "
            "name the folder of a run or of an imported model"
        ) from None
    model = inherited.get("model") if isinstance(inherited, dict) else None
    given = tree.get("model") or {}
    both = isinstance(model, dict) and isinstance(given, dict)
    return {**tree, "model": _merge(model, given)} if both else tree  # pyright: ignore[reportArgumentType]


def _value_at(tree: dict[str, Any], section: str, key: str) -> Any:
    keys = tree.get(section)
    return keys.get(key) if isinstance(keys, dict) else None


def _section(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in parents:
        raise UserError(f"{path}: includes itself; break the circle")
    try:
        tree = read_yaml(_text_of(path))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not sections of keys such as 'model:'")
    merged: dict[str, Any] = {}
    includes = tree.pop("include", [])
    for name in [includes] if isinstance(includes, str) else includes:
        included = path.parent / str(name)
        if not included.is_file():
            raise UserError(f"{path}: include = {name}: no such file beside it")
        merged = _merge(merged, _read(included, (*parents, path.resolve())))
    return _merge(merged, tree)


def _text_of(path: Path) -> str:
    return read_plain(path, most=MOST_BYTES).decode("utf-8")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        # A blend is one value, not a section: naming other shards must not add to the included ones.
        both = isinstance(below, dict) and isinstance(value, dict) and key != "blend"
        merged[key] = _merge(below, value) if both else value  # pyright: ignore[reportArgumentType]
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is no override; write key=value, such as train.steps=100")
    if key not in (keys := config_keys()):
        raise UserError(f"{override}: {_unknown(key, keys)}")
    *sections, leaf = key.split(".")
    value = _value(key, text, override)
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[leaf] = value


def _value(key: str, text: str, override: str) -> Any:
    # A pattern such as *M or [ME]x2 means something else in YAML; what is a text is taken as it stands.
    if key in TEXT_KEYS and text != "null" and text[:1] not in ("'", '"'):
        return text
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{override}: the value is not YAML; quote it") from None


def _explain(detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    value, kind = detail["input"], detail["type"]
    if kind == "extra_forbidden":
        if location[0] == "stages":
            return f"{key} is no key that a stage can change; those are {', '.join(STAGE_KEYS)}"
        return _unknown(key, config_keys())
    if kind == "missing":
        return f"{key} is not set; add it"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    message = detail["msg"].removeprefix("Input should be ").rstrip(".").replace("valid tuple", "list")
    shown = repr(value) if isinstance(value, str) else str(value).replace("None", "null")
    return f"{key} = {shown[:80]}: give {message}"


def _unknown(key: str, keys: list[str]) -> str:
    near = _nearest(key, keys)
    hint = f"did you mean {near}?" if near else "see `plait config schema`"
    return f"{key} is not a key; {hint}"


def _nearest(word: str, words: list[str]) -> str | None:
    leaf = word.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    by_leaf = [w for w in words if w.rsplit(".", 1)[-1] == leaf]
    return near[0] if near else (by_leaf[0] if by_leaf else None)
