"""Compiled code on disk belongs to the present sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import collate
import packing
from collate.masking import _choose_words
from packing.draws import fisher_yates
from packing.numba_tools import stamp


def test_every_kernel_carries_the_stamp():
    """A change in the package, or in its own folder: the kernels of masking call those of words."""
    assert stamp() in fisher_yates._cache._cache_file._source_stamp
    own = stamp(Path(collate.__file__).parent)
    assert {stamp(), own} <= set(_choose_words._cache._cache_file._source_stamp) and own != stamp()


@pytest.mark.parametrize("package", [packing, collate], ids=["packing", "collate"])
def test_an_edit_of_any_file_is_another_stamp(tmp_path, package):
    """In any folder."""
    copy = tmp_path / "package"
    shutil.copytree(Path(package.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    stamps = [stamp.__wrapped__(copy)]
    for file in sorted(copy.rglob("*.py")):
        file.write_text(file.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")
        stamps.append(stamp.__wrapped__(copy))
    assert len(set(stamps)) == len(stamps) > 20


NUMBER = "from packing.numba_tools import njit\n\n@njit(cache=True)\ndef number():\n    return {}\n"
CALL = """
from packing.numba_tools import njit
from packing.deep.part import number
from collate.deep.part import number as other

@njit(cache=True)
def call():
    return number(), other()
"""


def test_a_change_in_a_file_that_is_called_is_noticed(tmp_path):
    """A kernel of collate calls kernels of other files: Numba alone would use their old code."""
    for package in ("packing", "collate"):
        (tmp_path / package / "deep").mkdir(parents=True)
        for folder in (package, f"{package}/deep"):
            (tmp_path / folder / "__init__.py").write_text("")
    shutil.copy(Path(packing.__file__).with_name("numba_tools.py"), tmp_path / "packing")
    (tmp_path / "collate" / "caller.py").write_text(CALL)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    program = "from collate.caller import call; print(*call(), sum(call.stats.cache_hits.values()))"
    found = []
    for numbers in ((1, 1), (1, 1), (2, 1), (2, 2)):
        for package, number in zip(("packing", "collate"), numbers, strict=True):
            (tmp_path / package / "deep" / "part.py").write_text(NUMBER.format(number))
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        found.append(ran.stdout.split())
    assert found == [["1", "1", "0"], ["1", "1", "1"], ["2", "1", "0"], ["2", "2", "0"]]


WITHOUT_A_HOME = """
import os, sys
from numba.core import caching
os.umask(0o022)
unwritable = lambda self: (_ for _ in ()).throw(OSError("read-only"))
caching.InTreeCacheLocator.ensure_cache_path = caching.UserWideCacheLocator.ensure_cache_path = unwritable
from packing.draws import fisher_yates
print(fisher_yates._cache.cache_path)
"""


@pytest.mark.parametrize("folder", ["absent", "ours", "open to others", "a link"])
def test_where_no_cache_can_be_written_beside_the_sources_or_in_the_home(tmp_path, folder):
    """The temporary folder is used if nobody else can write there; otherwise kernels are not cached."""
    path = tmp_path / f"dataset-packing-kernels-{os.getuid()}"
    if folder == "a link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif folder != "absent":
        path.mkdir()
        path.chmod(0o777 if folder == "open to others" else 0o700)
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_HOME], capture_output=True, text=True, env=environment, check=True
    )
    found = ran.stdout.strip()
    assert found.startswith(str(path)) if folder in ("absent", "ours") else found == "None"
