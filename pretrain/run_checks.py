"""What can be known of a run before its first rank starts, perhaps hours later and on other machines."""

from ..data.plan import open_blend
from ..errors import UserError
from .checkpoint.catalogue import whole_checkpoints
from .config import Config
from .course import check_stages_reached
from .initial_weights import find_initial_weights
from .run_folder import RunFolder
from .train_state import changed_keys

__all__ = ["check_run"]


def check_run(config: Config) -> None:
    """Open the shards of all stages, compare the config with the checkpoint it would go on from, and make the
    run's folder, with its config and tokenizer.

    Raises:
        UserError: the run would end at its start, or another process trains in its folder.
    """
    folder = RunFolder(config.run.dir)
    holder = folder.holder()
    if holder.held:
        raise UserError(
            f"run.dir = {folder.path}: process {holder.pid} on {holder.host} is training here; wait for it, "
            "or choose another folder"
        )
    for stage in config.each_stage():
        open_blend(stage.data.blend)
    if config.data.validation is not None:
        open_blend({config.data.validation: 1.0})
    checkpoints = whole_checkpoints(folder.checkpoints, lambda _: None)
    initial = None
    if checkpoints:
        changed_keys(checkpoints[-1], config)
    else:
        check_stages_reached(config)
        initial = find_initial_weights(config)
    folder.prepare(config, initial.folder if initial else None)
