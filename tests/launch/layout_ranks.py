"""What ranks really hold and send, for the tests of `plait config layout`.

    python layout_ranks.py FOLDER RANK RANKS

FOLDER/cases.json holds configs by name; FOLDER/RANK.json gets, for each, the bytes of this rank's parameters
and of AdamW's state, and the ledger of a step.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plait.parallel.placements import local
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer


def measure(tree: dict[str, Any]) -> dict[str, Any]:
    trainer = Trainer(parse_config(tree, "case"))
    model, optimizer = trainer.state.model, trainer.state.optimizer
    with trainer._loader() as loader:
        batch, _ = loader.next()
    with trainer.mesh.record() as ledger:
        trainer.train_step(batch)
    return {
        "parameters": sum(local(p).nbytes for p in model.parameters()),
        "optimizer": sum(
            local(value).nbytes for state in optimizer.state.values() for value in state.values()
        ),
        "sequences": [len(batch["tokens"]), batch["tokens"].shape[1]],
        "ledger": [asdict(entry) for entry in ledger.entries],
    }


def main(folder: Path, rank: int, ranks: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    cases = json.loads((folder / "cases.json").read_text())
    measured = {name: measure(tree) for name, tree in cases.items()}
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
