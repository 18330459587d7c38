"""`plait train` of which one rank sleeps, and later another is stopped, in the middle of a step.

    hanging_train.py FOLDER train CONFIG …

FOLDER remembers what has happened already: each happens once.
"""

import os
import signal
import sys
import time
from pathlib import Path

from plait.launch.cli import main
from plait.pretrain.micro_batches import Arrays
from plait.pretrain.trainer import Metrics, Trainer

ASLEEP, STOPPED = 10, 20
"""The steps in which rank 1 sleeps and rank 0 is stopped."""


def sleep_forever() -> None:
    while True:
        time.sleep(60)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


DEEDS = {ASLEEP: (1, sleep_forever), STOPPED: (0, stop)}

if __name__ == "__main__":
    done = Path(sys.argv.pop(1))
    train_step = Trainer.train_step

    def step(self: Trainer, batch: Arrays) -> Metrics:
        number = self.state.step + 1
        rank, deed = DEEDS.get(number, (-1, stop))
        if self.mesh.rank == rank and not (done / str(number)).exists():
            (done / str(number)).touch()
            deed()
        return train_step(self, batch)

    Trainer.train_step = step
    main()
