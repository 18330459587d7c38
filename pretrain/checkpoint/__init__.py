"""A run's checkpoints: any layout's tensors in, any layout's tensors out, whole or not at all.

Read `checkpoints.py` (a run's checkpoints, saved and found), `storage.py` (torch's distributed
checkpoint with raw bytes and JSON in the place of pickles), `index.py` (where each tensor lies),
`manifest.py` (facts, sizes, checksums), `folders.py` (names, and what a crash leaves) and
`staging.py` (copies that let training go on).
"""

from .checkpoints import Checkpoint, CheckpointError, Checkpoints

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints"]
