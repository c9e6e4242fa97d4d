"""What each quantization type costs: bits really stored a weight, error, import speed against a plain import.

python tests/bench/bench_types.py [--gigabytes 1] [--rounds 3] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_import import run_import, warm
from made_models import write_model
from report import alternate, print_machine, touch_memory

TYPES = ("int4", "int8", "nvfp4", "mxfp8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        write_model(work / "model", total_bytes=int(options.gigabytes * 1e9))
        subprocess.run(["sync"], check=True)
        warm(work / "model")
        print_machine("source in the page cache; a fresh store each time")

        def settle() -> None:
            subprocess.run(["sync"], check=True)
            warm(work / "model")
            touch_memory(2)

        def clean() -> None:
            for each in ("none", *TYPES):
                shutil.rmtree(work / each, ignore_errors=True)

        def importing(qtype: str) -> object:
            return run_import(work / "model", work / qtype, *(() if qtype == "none" else ("--quantize", qtype)))

        sides = {qtype: (lambda qtype=qtype: importing(qtype)) for qtype in ("none", *TYPES)}  # type: ignore[misc]
        medians = alternate({"(clean up)": clean, **sides}, rounds=options.rounds, before=settle)
        size = sum(path.stat().st_size for path in (work / "model").rglob("*") if path.is_file())
        print("| type | bits a weight | error | import speed | against a plain import |")
        print("| --- | --- | --- | --- | --- |")
        for qtype in TYPES:
            bits, error = stored(work / qtype, f"model:{qtype}")
            speed = size / medians[qtype] / 1e9
            print(
                f"| {qtype} | {bits:.2f} | {error:.2%} | {speed:.2f} GB/s | {medians[qtype] / medians['none']:.2f}× |"
            )


def stored(store: Path, name: str) -> tuple[float, float]:
    """Bits that a quantized weight really takes, header and all, and the transformer's error."""
    command = [sys.executable, "-m", "modelcask", "show", name, "--json", "--store", str(store)]
    shown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    sizes = {layer["name"]: layer["size"] for layer in shown["layers"] if layer["mediaType"].endswith("image.tensor")}
    quantized = [each for each in shown["tensors"] if each["error"] is not None]
    weights = 0
    for each in quantized:
        count = 1
        for size in each["shape"]:
            count *= size
        weights += count
    return 8 * sum(sizes[each["name"]] for each in quantized) / weights, shown["component_facts"]["transformer"][
        "error"
    ]


if __name__ == "__main__":
    main()
