"""What `plait config stages` shows: a row a stage."""

from rich.console import Console

from ..pretrain.config import Config
from ..pretrain.config_file import differing_keys
from ..pretrain.course import course, tokens_a_step
from .whole_tables import plain_table, print_whole

__all__ = ["show_stages"]


def show_stages(config: Config) -> None:
    """Print the stages of a new run, by arithmetic on its config."""
    table = plain_table("stage", "from step", "steps", "from tokens", "tokens a step", "what changes")
    for column in table.columns[:5]:
        column.justify = "right"
    stretches = list(course(config))
    before, end = config.at(0), 0
    for stretch in stretches:
        present = stretch.config
        changes = [f"{key} = {now}" for key, (_, now) in differing_keys(before, present).items()]
        table.add_row(
            str(stretch.stage),
            f"{stretch.first_step + 1:,}",
            f"{stretch.steps:,}",
            f"{stretch.first_tokens:,}",
            f"{tokens_a_step(present):,}",
            ", ".join(changes),
        )
        before, end = present, stretch.first_tokens + stretch.steps * tokens_a_step(present)
    console = Console(highlight=False)
    print_whole(console, table)
    console.print(f"{config.train.steps:,} steps, {end:,} tokens")
    reached = stretches[-1].stage
    for number, stage in enumerate(config.stages[reached:], start=reached + 1):
        console.print(f"[yellow]stage {number}[/] from {stage.from_tokens:,} tokens on is never reached")
