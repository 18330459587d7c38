"""What many ranks do together: who is who, what they say to each other, who holds what.

Read `mesh.py` (the axes and each rank's place on them), `collectives.py` (messages with gradients) and
`ledger.py` (their record). Then how one thing each travels: `state_passing.py` (SSM states), `halo.py`
(the convolution's last tokens), `attention.py` (keys, values, queries), `vocabulary.py` (rows of the
embedding and the head). Last, how parameters lie: `placements.py` (over tp) and `fsdp.py` (over the
rest). `processes.py` starts and ends a rank.
"""

from .mesh import AXES, Axis, Mesh

__all__ = ["AXES", "Axis", "Mesh"]
