"""The command line: quick to answer, and both names are one command."""

import json
import os
import resource
import subprocess
import sys

import yaml

from plait.pretrain.config import Config


def plait(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "plait.launch", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['plait', '--help']\n"
        "from plait.launch.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pydantic', 'megatron'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    # Half a second is promised; of the processor's time, since others may use it too.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_show_needs_no_torch():
    code = (
        "import sys; sys.argv = ['plait', 'config', 'show', 'demo']\n"
        "from plait.launch.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pattern" in done.stdout


def test_show_is_a_config_and_schema_knows_it(tmp_path):
    shown = plait("config", "show", "configs/demo.yaml", "train.steps=700", "model.pattern=*[M-]x2")
    assert shown.returncode == 0, shown.stderr
    tree = yaml.safe_load(shown.stdout)
    assert tree["train"]["steps"] == 700
    assert tree["model"]["pattern"] == "*[M-]x2"
    Config.model_validate(tree)
    schema = json.loads(plait("config", "schema").stdout)
    described = schema["$defs"]["TrainConfig"]["properties"]["stop_at"]["description"]
    assert described.startswith("End at this step")


def test_train_prints_plain_lines_without_a_terminal_and_resumes(tiny, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    first = plait("train", file, "train.stop_at=4")
    assert first.returncode == 0, first.stderr
    assert "step  4/12" in first.stdout
    assert "\x1b" not in first.stdout
    assert "stopped at step 4 of 12" in first.stdout
    second = plait("train", file)
    assert "resumed from the checkpoint of step 4" in second.stdout
    assert "finished at step 12" in second.stdout
    assert second.stderr == ""
    drawn = plait("plot", tmp_path / "run")
    assert drawn.stdout.strip() == str(tmp_path / "run" / "loss.png")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    drawn = plait("plot", tmp_path / "run", "--metric", "max_violation")
    assert drawn.stdout.strip() == str(tmp_path / "run" / "max_violation.png")
    assert (tmp_path / "run" / "max_violation.png").read_bytes().startswith(b"\x89PNG")
