"""Megatron's indexed datasets come without its package, and the package comes whole to who asks for it."""

import subprocess
import sys

CODE = """
import sys
from plait.data.megatron import indexed_dataset
module = indexed_dataset()
assert module is indexed_dataset()
assert module.IndexedDatasetBuilder.__module__ == "megatron.core.datasets.indexed_dataset"
assert not [name for name in sys.modules if name.startswith("megatron.core")]
assert "torch._inductor" not in sys.modules
import megatron.core
from megatron.core.datasets import indexed_dataset as whole
assert megatron.core.__version__ and megatron.core.tensor_parallel and megatron.core.utils
assert whole.IndexedDataset is not module.IndexedDataset
assert indexed_dataset() is module
"""


def test_alone_and_then_whole():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_version_whose_modules_need_the_package_gets_it(tmp_path):
    core = tmp_path / "megatron" / "core"
    (core / "datasets").mkdir(parents=True)
    (core / "__init__.py").write_text("LAYERS = 1\n")
    (core / "parallel_state.py").write_text("from . import LAYERS\n")
    (core / "datasets" / "__init__.py").touch()
    (core / "datasets" / "indexed_dataset.py").write_text("from .. import LAYERS\n")
    code = (
        "import sys; sys.modules.pop('megatron', None); sys.path.insert(0, sys.argv[1])\n"
        "import megatron; megatron.__path__ = [sys.argv[1] + '/megatron']\n"
        "from plait.data.megatron import indexed_dataset\n"
        "assert indexed_dataset().LAYERS == 1\n"
        "assert sys.modules['megatron.core'].LAYERS == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
