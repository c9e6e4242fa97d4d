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
from safetensors import safe_open
from safetensors.torch import save_file

from . import mlx_reader
from .odd_pipelines import ODD_PIPELINES
from .pipelines import PIPELINES

_PIPELINES = {**PIPELINES, **ODD_PIPELINES}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "build":
            _PIPELINES[request["pipeline"]].build(Path(request["folder"]))
        case "run":
            image = _PIPELINES[request["pipeline"]].run(request["folder"], **request["load"])
            save_file({"image": image.contiguous()}, request["image"])
            # Modules refer to one another in cycles; what they have mapped would keep the mount busy.
            gc.collect()
        case "mlx_digests":
            digests = mlx_reader.digests(Path(request["shard"]), request["quantization"], request["dtypes"])
            return {"ok": True, "digests": digests}
        case "shapes":
            with safe_open(request["shard"], "pt") as shard:
                names = shard.keys()
                return {"ok": True, "shapes": {name: list(shard.get_tensor(name).shape) for name in names}}
        case unknown:
            raise ValueError(unknown)
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
