"""The training loop: batches in, parameters moved, callbacks told."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.loader import Loader
from ..data.plan import Plan, open_blend, open_sources
from ..data.window import IGNORE
from ..errors import UserError
from ..parallel.collectives import sum_in_place
from ..parallel.failures import failure_of
from ..parallel.stragglers import Works, find_stragglers
from .callbacks.base import Callback
from .checkpoint import Checkpoint, Checkpoints
from .config import Config
from .config_file import differing_keys
from .course import check_stages_reached, tokens_a_step
from .flops import flops_per_token, peak_flops
from .initial_weights import find_initial_weights
from .loss import MicroBatch, StepCounts, accumulate_gradients
from .micro_batches import Arrays, cut_batch
from .model import build_model
from .optimizer import build_optimizer, clip_gradients, learning_rate
from .ranks import device_of, mesh_of
from .readable import readable_count, readable_time
from .run_folder import RunFolder, write_status
from .run_log import note
from .sharding import shard_model
from .stage_config import stage_number
from .step_sums import StepSums, sum_parts
from .stopping import Stopping
from .train_state import FROM_THE_START, ScheduleBegin, TrainState, changed_keys

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]

MOST_SHARES = 64
"""Sources of a blend whose shares go into the metrics of every step; `Plan.shares` gives those of more."""


class Trainer:
    """A run on this rank, from its config to its last step.

    Making one opens the data, builds the model and, where the run's folder holds a checkpoint, takes
    it up from the newest whole one; else `checkpoint.init_from` may name where it begins.

    Args:
        signalled: whether a signal asked to stop, and which.
        written: what the folder's config.yaml says, if not `config`: that is in the layout that could be had.

    Attributes:
        state: model, optimizer and counters; what a checkpoint holds.
        config: as it was given.
        present: the config as it holds in the present stage.
        resumed_from: the step it was taken up at, or None for a new run.
        failed: whether an error ended the loop; the other ranks may not be there any more.
        stopping: why it ends before its last step.
        changes: keys whose value is not that of the checkpoint: key -> (then, now).
        begun_from: where a new run's weights come from; None where they come from the seed.

    Raises:
        UserError: anything in the config, the data or the folder that its maker can mend.
    """

    def __init__(
        self,
        config: Config,
        callbacks: Sequence[Callback] = (),
        signalled: Callable[[], str | None] = lambda: None,
        written: Config | None = None,
    ) -> None:
        self.config, self.callbacks = config, list(callbacks)
        self.present = config.at(0)
        self.failed = False
        self.device = device_of(config)
        self.mesh = mesh_of(config).connect(self.device)
        self.dtype = getattr(torch, config.train.dtype)
        self._works = Works(self.mesh)
        self.folder = RunFolder(config.run.dir)
        first = self.mesh.rank == 0
        self.stopping = Stopping(
            self.folder.stop_file if first else None, config.train.time_limit if first else None, signalled
        )
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            background=config.checkpoint.async_,
            warn=logger.warning,
            absence=self.folder.absence,
        )
        self._lock = self.folder.lock() if first else None
        # Of all stages, so that what a later one lacks shows at once.
        self._sources = [open_blend(stage.data.blend)[0] for stage in config.each_stage()]
        newest = self._newest_checkpoint()
        changes = self.changes = changed_keys(newest, config) if newest else {}
        if newest is None:
            check_stages_reached(config)
        initial = None if newest else find_initial_weights(config)
        if first:
            self.folder.prepare(written or config, initial.folder if initial else None)
        model = build_model(
            config.model,
            seed=config.run.seed,
            dtype=torch.promote_types(self.dtype, torch.float32),
            device=self.device,
            mesh=self.mesh,
            activation_checkpointing=config.train.activation_checkpointing,
            shard=lambda model: shard_model(model, self.mesh, self.dtype),
        )
        plan = Plan.start(self._sources[0], seed=config.run.seed, seq_len=config.data.seq_len)
        self.state = TrainState(model, build_optimizer(model, config.optim), plan)
        self.resumed_from = newest.step if newest else None
        if newest:
            self.state.resume(newest, changes)
        elif initial:
            initial.load_into(self.state)
        self._enter_stage()
        self.begun_from = str(initial) if initial else None

    @property
    def last_step(self) -> int:
        """The step this run of the command ends at, as far as is known."""
        if self.stopping.reason is not None:
            return self.state.step
        return min(self.config.train.steps, self.config.train.stop_at or self.config.train.steps)

    def run(self) -> bool:
        """Train to the last step, or until asked to stop; returns whether the schedule is finished."""
        began = time.monotonic()
        self._tell("running")
        try:
            self._train()
            self.stopping.obeyed()
            finished = self.state.step >= self.config.train.steps
            ended = "finished" if finished else "stopped"
            self._tell(ended, self.stopping.reason)
            self.say(
                f"{ended}: step {self.state.step} of {self.config.train.steps}, "
                f"{readable_count(self.state.tokens)} tokens, {readable_time(time.monotonic() - began)} "
                "since the start"
            )
        except BaseException as error:
            self._tell("failed", failure_of(error, self.mesh.rank)[0].message)
            raise
        finally:
            self.close()
        return finished

    def _train(self) -> None:
        state = self.state
        logger.info("from step %d to %d, %s", state.step, self.last_step, self.device)
        self._peak = peak_flops(self.device, self.dtype) * self.mesh.world_size
        began = []
        try:
            for callback in self.callbacks:
                began.append(callback)
                callback.start(self)
            while state.step < self.last_step:
                if self._stage_is_over():
                    changes = self._enter_stage()
                    for callback in self.callbacks:
                        callback.stage(self, changes)
                self._train_stage()
        except BaseException:
            self.failed = True
            raise
        finally:
            for callback in began:
                callback.end(self)

    def say(self, event: str) -> None:
        """Add a line to the run's log; called on every rank, or on the first alone."""
        if self.mesh.rank == 0 and self.folder.absence() is None:
            note(self.folder.path, event)

    def _train_stage(self) -> None:
        """Train to the last step of the present stage."""
        with self._loader() as loader:
            while self.state.step < self.last_step and not self._stage_is_over():
                start = time.perf_counter()
                self._works.begin()
                batch, waited = loader.next()
                metrics = self.train_step(batch)
                self.state.samples = loader.cursor
                self._account(metrics, time.perf_counter() - start, waited)
                for callback in self.callbacks:
                    callback.step(self, metrics)

    def _tell(self, state: str, reason: str | None = None) -> None:
        if self.mesh.rank == 0:
            write_status(self.folder, state, self.state.step, reason)

    def close(self) -> None:
        """Let go of the run's folder; `run` does so at its end."""
        if self._lock is not None:
            self._lock.close()

    def train_step(self, batch: Arrays) -> Metrics:
        """One optimizer step on this rank's sequences; returns the first of the step's metrics."""
        config, state = self.present, self.state
        begun = state.schedule.step
        rate = learning_rate(state.step + 1 - begun, config.optim, config.train.steps - begun)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        counts = self._count(batch)
        parts = accumulate_gradients(
            state.model, self.micro_batches(batch), counts, dtype=self.dtype, z_loss=config.train.z_loss
        )
        norm = float(clip_gradients(state.model, self.mesh, config.optim.clip))
        sums = sum_parts(parts, self.mesh, self.stopping.wishes(), self._works.message())
        loss = sums.loss
        if not (math.isfinite(norm) and math.isfinite(loss)):
            # Before the optimizer sees it: what the last checkpoint holds is sound.
            raise UserError(
                f"step {state.step + 1}: the loss is {loss} and the gradient's norm {norm}; lower optim.lr = "
                f"{config.optim.lr} or lengthen optim.warmup_steps, and go on from the last checkpoint"
            )
        state.optimizer.step()
        state.optimizer.zero_grad()
        loads = self._balance_experts(sums, counts)
        state.step += 1
        state.tokens += counts.tokens
        self.stopping.hear(sums.wishes)
        return {
            "step": state.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "tokens": state.tokens,
            **sums.extra,
            **loads,
            **self._state_norms(sums),
            **find_stragglers(sums.works, self.mesh.sizes),
        }

    def _newest_checkpoint(self) -> Checkpoint | None:
        return self.checkpoints.newest_intact()

    def _stage_is_over(self) -> bool:
        return stage_number(self.config.stages, self.state.tokens) != self.stage

    def _enter_stage(self) -> dict[str, tuple[Any, Any]]:
        """Take up what the config says of the tokens trained on so far; returns what it changes, by key."""
        config, state = self.config, self.state
        before = self.present
        self.stage = stage_number(config.stages, state.tokens)
        self.present = config.at(state.tokens)
        begun = [stage.from_tokens for stage in config.stages[: self.stage] if stage.begins_schedule]
        if not begun:
            state.schedule = FROM_THE_START
        elif begun[-1] != state.schedule.from_tokens:
            state.schedule = ScheduleBegin(begun[-1], state.step)
        state.plan = state.plan.leave_out(config.data.skip, first_sample=state.samples).go_on(
            self._sources[self.stage],
            first_sample=state.samples,
            seed=config.run.seed,
            seq_len=self.present.data.seq_len,
        )
        self._flops = flops_per_token(config.model, self.present.data.seq_len)
        return differing_keys(before, self.present)

    def _loader(self) -> Loader:
        config, state = self.present, self.state
        return Loader(
            state.plan,
            open_sources(state.plan, state.samples),
            cursor=state.samples,
            batch_size=config.train.batch_size,
            rows=self.mesh.rows(config.train.batch_size),
            part=self.mesh.tokens(config.data.seq_len),
            isolate_documents=config.data.isolate_documents,
            workers=config.data.workers,
        )

    def _count(self, batch: Arrays) -> StepCounts:
        """What the whole step has, of which `batch` is this rank's part."""
        size, length = self.present.train.batch_size, self.present.data.seq_len
        targets = torch.tensor(int((batch["targets"] != IGNORE).sum()), device=self.device)
        sum_in_place(targets, self.mesh.axes["data"])
        return StepCounts(targets=int(targets), tokens=size * length, sequences=size)

    def micro_batches(self, batch: Arrays) -> list[MicroBatch]:
        """A batch as the loader gives it, as tensors on this rank's device.

        Raises:
            UserError: an id that the model has no row for.
        """
        config = self.present
        vocabulary = config.model.vocab_size
        if (largest := batch["tokens"].max()) >= vocabulary:
            raise UserError(
                f"model.vocab_size = {vocabulary} but the shards hold the id {largest}; "
                f"set model.vocab_size to their tokenizer's, at least {largest + 1}"
            )
        return cut_batch(
            batch,
            self.mesh,
            length=config.data.seq_len,
            rows=self.mesh.most_rows(config.train.batch_size),
            size=config.train.micro_batch_size,
            device=self.device,
            isolate_documents=config.data.isolate_documents,
        )

    def _balance_experts(self, sums: StepSums, counts: StepCounts) -> Metrics:
        """Move the routers' biases by the whole step's counts; returns how uneven load and scores were."""
        routers = self.state.model.routers
        if not routers:
            return {}
        for router, counts_E in zip(routers, sums.counts, strict=True):
            router.balance(counts_E)
        return {
            "max_violation": [router.max_violation for router in routers],
            "dead_experts": [router.dead_experts for router in routers],
            "router_entropy": [entropy / counts.tokens for entropy in sums.entropies],
        }

    def _state_norms(self, sums: StepSums) -> Metrics:
        """Root mean square of each SSM layer's states at the sequences' ends, over the step."""
        mamba = self.config.model.mamba
        if mamba is None or not sums.state_squares:
            return {}
        elements = self.present.train.batch_size * mamba.d_inner * mamba.d_state
        return {"state_norm": [(square / elements) ** 0.5 for square in sums.state_squares]}

    def _account(self, metrics: Metrics, seconds: float, waited: float) -> None:
        self._works.end(seconds)
        metrics["samples"] = self.state.samples
        if 1 < len(self.state.plan.stages[-1].sources) <= MOST_SHARES:
            metrics["blend_share"] = self.state.plan.shares(self.state.samples)
        tokens = tokens_a_step(self.present)
        metrics["tokens_per_second"] = tokens / seconds
        metrics["step_seconds"] = seconds
        metrics["data_seconds"] = waited
        metrics["mfu"] = tokens / seconds * self._flops / self._peak
