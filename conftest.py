"""Makes an uninstalled checkout behave like an installed one: `paperclaims` is this folder, for every test."""

import os
import shutil
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# `python -m pytest` puts the checkout itself on the path, where our `kernels` would shadow another project's package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

package = types.ModuleType("paperclaims")
package.__path__ = [str(ROOT)]
sys.modules["paperclaims"] = package

# One thread a worker, and Triton interpreted where there is no GPU; both must stand before torch and triton are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["paperclaims.fixtures.plugin"]
