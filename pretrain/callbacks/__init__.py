"""What varies around the training loop: small objects that it calls.

`base.py` says what a callback hears. In the order in which the loop calls them: `evaluation.py` adds
to the step's metrics, `metrics.py` records them, `run_log.py` tells what matters of them, `progress.py`
shows them, `checkpointing.py` saves. `stragglers.py` tells which rank is slow.
`watchdog.py`, before and after them, says that the rank is alive.
"""

from .base import Callback
from .checkpointing import Checkpointing
from .evaluation import Evaluation
from .metrics import MetricsFile, TensorBoard
from .progress import Progress
from .run_log import RunLog
from .stragglers import Stragglers
from .watchdog import Heartbeat

__all__ = [
    "Callback",
    "Checkpointing",
    "Evaluation",
    "Heartbeat",
    "MetricsFile",
    "Progress",
    "RunLog",
    "Stragglers",
    "TensorBoard",
]
