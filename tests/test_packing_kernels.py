"""Compiled code on disk is that of the sources as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import packing
from packing.draws import fisher_yates
from packing.kernels import stamp

PROGRAM = "import numpy as np; from packing.caller import call; print(call())"


def test_every_kernel_carries_the_stamp():
    assert stamp() in fisher_yates._cache._cache_file._source_stamp


def test_a_change_in_a_file_that_is_called_is_noticed(tmp_path):
    """A kernel that calls one of another file: Numba alone would go on with the old one."""
    copy = tmp_path / "packing"
    copy.mkdir()
    shutil.copy(Path(packing.__file__).with_name("kernels.py"), copy)
    (copy / "__init__.py").write_text("")
    (copy / "caller.py").write_text(
        "from .called import number\nfrom .kernels import njit\n\n@njit(cache=True)\ndef call():\n    return number()\n"
    )
    found = []
    for number in (1, 1, 2):
        called = f"from .kernels import njit\n\n@njit(cache=True)\ndef number():\n    return {number}\n"
        (copy / "called.py").write_text(called)
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
        )
        found.append(int(ran.stdout))
    assert found == [1, 1, 2]
