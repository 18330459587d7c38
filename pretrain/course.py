"""The way a run will go through the stages of its config, by arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..data.plan import Plan, open_blend
from ..errors import UserError
from .config import Config
from .stage_config import stage_number

__all__ = ["Stretch", "check_stages_reached", "course", "plan_of_step", "tokens_a_step"]


@dataclass(frozen=True)
class Stretch:
    """Steps through which one stage holds."""

    stage: int
    """0 for the beginning of the config, n for its n-th stage."""
    config: Config
    """As it holds there."""
    first_step: int
    """Steps done before it."""
    steps: int
    first_tokens: int
    """Tokens trained on before it."""


def course(config: Config) -> Iterator[Stretch]:
    """The stretches of a new run; a stage that is over before a step begins with it has none."""
    stages, step, tokens = config.each_stage(), 0, 0
    while step < config.train.steps:
        stage = stage_number(config.stages, tokens)
        present, steps = stages[stage], config.train.steps - step
        if stage < len(config.stages):
            left = config.stages[stage].from_tokens - tokens
            steps = min(steps, -(-left // tokens_a_step(present)))
        yield Stretch(stage, present, step, steps, tokens)
        step, tokens = step + steps, tokens + steps * tokens_a_step(present)


def tokens_a_step(config: Config) -> int:
    return config.train.batch_size * config.data.seq_len


def check_stages_reached(config: Config) -> None:
    """
    Raises:
        UserError: a new run of the config would end before one of its stages begins.
    """
    *_, last = course(config)
    if last.stage == len(config.stages):
        return
    end = last.first_tokens + last.steps * tokens_a_step(last.config)
    unreached = f"stages.{last.stage}.from_tokens = {config.stages[last.stage].from_tokens}"
    raise UserError(
        f"{unreached} is never reached: with train.steps = {config.train.steps} the run ends at {end} "
        "tokens; raise train.steps, or take the stage out"
    )


def plan_of_step(config: Config, step: int) -> tuple[Plan, list[int], Config]:
    """What a new run of a config reads at a step, 1 being the first.

    Returns:
        The plan, the step's samples, and the config as it holds there.

    Raises:
        UserError: shards that are missing or damaged, or as for `Plan.append`.
    """
    plan, cursor = None, 0
    for stretch in course(config):
        present, size = stretch.config, stretch.config.train.batch_size
        sources, _ = open_blend(present.data.blend)
        seed, seq_len = config.run.seed, present.data.seq_len
        if plan is None:
            plan = Plan.start(sources, seed=seed, seq_len=seq_len).leave_out(config.data.skip, first_sample=0)
        plan = plan.go_on(sources, first_sample=cursor, seed=seed, seq_len=seq_len)
        last = stretch.first_step + stretch.steps
        # The last stage holds for ever.
        if step <= last or last == config.train.steps:
            cursor = plan.advance(cursor, (step - 1 - stretch.first_step) * size)
            return plan, plan.take(cursor, size), present
        cursor = plan.advance(cursor, stretch.steps * size)
    raise AssertionError("a run has at least one step")
