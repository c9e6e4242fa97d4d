"""One fuzz target under atheris: `run.py` starts it."""

from __future__ import annotations

import atexit
import shutil
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "daemon"), str(HERE.parents[1] / "fs")]

with atheris.instrument_imports(include=["modelcask", "modelcaskfs", "tomllib"]):
    import targets

name = sys.argv.pop(1)
atexit.register(shutil.rmtree, targets._scratch(), ignore_errors=True)
target = targets.TARGETS[name]
targets.seeds(name)  # what is made once is made before the first execution
atheris.Setup(sys.argv, lambda data: targets.run(target, data))
atheris.Fuzz()
