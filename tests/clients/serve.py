"""The client process: builds and runs pipelines as it is told, a JSON line for each request and answer.

Run as `python -m clients.serve` in `tests/`; `client.Client` is the other end. Loading happens here and not
in pytest, because a filesystem that hangs would hang the loader too, in a system call that only the end of
the process ends; and because diffusers reads HF_ENABLE_PARALLEL_LOADING once, when it is imported.
"""

import gc
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

import torch
from diffusers.utils import constants
from safetensors.torch import save_file

from .pipelines import PIPELINES


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    pipeline = PIPELINES[request["pipeline"]]
    folder = Path(request["folder"])
    if request["do"] == "build":
        pipeline.build(folder)
    else:
        image = pipeline.run(folder, **request["load"])
        save_file({"image": image.contiguous()}, request["image"])
        # Modules refer to one another in cycles; what they have mapped would keep the mount busy.
        gc.collect()
    return {"ok": True}


def main() -> None:
    """Answers until standard input ends."""
    # Libraries print; the answers get the real standard output for themselves.
    answers: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.filterwarnings("ignore")
    # One thread: sums in one order, and two cores are shared with the filesystem under test.
    torch.set_num_threads(1)
    print(json.dumps({"ok": True, "parallel": constants.HF_ENABLE_PARALLEL_LOADING}), file=answers)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception:  # noqa: BLE001 - whatever the libraries raise is the answer
            answer = {"ok": False, "error": traceback.format_exc()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
