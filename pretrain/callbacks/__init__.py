"""What varies around the training loop: small objects that it calls.

`base.py` says what a callback hears. In the order in which the loop calls them: `evaluation.py` adds
to the step's metrics, `metrics.py` records them, `progress.py` shows them, `checkpointing.py` saves.
"""

from .base import Callback
from .checkpointing import Checkpointing
from .evaluation import Evaluation
from .metrics import MetricsFile, TensorBoard
from .progress import Progress

__all__ = ["Callback", "Checkpointing", "Evaluation", "MetricsFile", "Progress", "TensorBoard"]
