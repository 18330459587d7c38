"""`plait config`: what a run would be, before it runs."""

import json
from typing import Annotated

import typer

app = typer.Typer(
    help="Show a run's full config, its stages, its layout over ranks, or the schema of all configs.",
    no_args_is_help=True,
)

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of one that plait ships.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=100.")
]


@app.command()
def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print the config with every default and override in place; the output is a config file again."""
    from ..pretrain.config_file import dump_config, load_config

    typer.echo(dump_config(load_config(config, overrides or ())), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of config files: every key, its type, its default, its meaning."""
    from ..pretrain.config import Config

    typer.echo(json.dumps(Config.model_json_schema(by_alias=True), indent=2))


@app.command()
def layout(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    every_rank: Annotated[bool, typer.Option("--all", help="A row for each rank, however many.")] = False,
) -> None:
    """Print who holds what in the layout that `parallel` asks for, and what is sent; no rank is started."""
    from ..pretrain.config_file import load_config
    from .layout_table import show_layout

    show_layout(load_config(config, overrides or ()), every_rank=every_rank)


@app.command()
def stages(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print the stages that a new run would go through: when each begins, and what it changes."""
    from ..pretrain.config_file import load_config
    from .stage_table import show_stages

    show_stages(load_config(config, overrides or ()))
