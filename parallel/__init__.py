"""What many ranks do together: who is who, what they say to each other, who holds what.

Read `mesh.py` (the axes of `axes.py` and each rank's place on them), `collectives.py` (messages with
gradients) and `ledger.py` (their record). Then how one thing each travels: `state_passing.py` (SSM
states), `halo.py` (the convolution's last tokens), `attention.py` (keys, values, queries),
`vocabulary.py` (rows of the embedding and the head). How parameters lie: `placements.py` (over tp) and
`fsdp.py` (over the rest). Last, a rank's life: `processes.py` starts and ends it, `watchdog.py` and
`failures.py` say which one is not there any more.
"""
