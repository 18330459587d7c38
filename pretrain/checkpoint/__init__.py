"""A run's checkpoints: any layout's tensors in, any layout's tensors out, whole or not at all.

Read `saved.py` (one checkpoint on disk), `catalogue.py` (which ones a folder holds, and which stay) and
`checkpoints.py` (a run's, as it saves and finds them). Below them lie `storage.py` (torch's distributed
checkpoint with raw bytes and JSON in the place of pickles), `index.py` (where each tensor lies),
`manifest.py` (facts, sizes, checksums), `files.py` (what reaches the disk), `folders.py` (names, and what
a crash leaves) and `staging.py` (copies that let training go on). `intact.py` reads one before it is loaded,
and `difference.py` compares two.
"""

from typing import TYPE_CHECKING, Any

from .files import CheckpointError
from .saved import Checkpoint

if TYPE_CHECKING:
    from .checkpoints import Checkpoints

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints"]


def __getattr__(name: str) -> Any:
    # Saving needs torch; whoever only looks at what is there does not wait for its import.
    if name == "Checkpoints":
        from .checkpoints import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
