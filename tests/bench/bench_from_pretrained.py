"""`from_pretrained` of a pipeline through the mount against the folder it was imported from; needs diffusers.

python tests/bench/bench_from_pretrained.py [--gigabytes 3] [--rounds 5] [--dir DIR]

The pipeline is made by configuration with random weights, in shards of 1 GB. Warm: each side was loaded before. Every
load is a process of its own, which times it after its imports, and then reads every weight once. Target: ≤ 1.10.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_import import run_import
from report import print_machine, touch_memory

_BUILD = """
import sys, torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
folder, gigabytes = sys.argv[1], float(sys.argv[2])
width = int(gigabytes**0.5 * 1150) // 32 * 32
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    unet = UNet2DModel(block_out_channels=(width // 2, width, width), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
unet.to_empty(device="cpu")
for weight in unet.parameters():
    weight.data.normal_(0, 0.02)
print(sum(weight.nbytes for weight in unet.parameters()) / 1e9)
DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder, max_shard_size="1GB")
"""

_LOAD = """
import sys, time, torch
from diffusers import DDPMPipeline
started = time.perf_counter()
pipeline = DDPMPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
loaded = time.perf_counter()
for weight in pipeline.unet.parameters():
    weight.view(torch.int16).max()
print(loaded - started, time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        size = float(python(_BUILD, str(work / "model"), str(options.gigabytes)))
        run_import(work / "model", work / "store")
        (work / "mnt").mkdir()
        subprocess.run([sys.executable, "-m", "modelcaskfs", str(work / "store"), str(work / "mnt")], check=True)
        try:
            print_machine(f"warm: loaded from both sides before; a pipeline of {size:.1f} GB")
            sides = {"folder": work / "model", "mount": work / "mnt/diffusers/library/model/latest"}
            taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
            touch_memory(8)
            for number in range(options.rounds + 1):
                for side, path in sides.items():
                    loaded, read = python(_LOAD, str(path)).split()
                    if number:
                        taken[side].append((float(loaded), float(read)))
            for which, what in enumerate(("from_pretrained", "… and all weights read")):
                mount, folder = ([each[which] for each in taken[side]] for side in ("mount", "folder"))
                ratio = statistics.median(a / b for a, b in zip(mount, folder, strict=True))
                print(
                    f"{what + ':':25} mount {statistics.median(mount):.2f} s, "
                    f"folder {statistics.median(folder):.2f} s, ratio {ratio:.2f} (target ≤ 1.10)"
                )
        finally:
            subprocess.run(["umount", str(work / "mnt")], check=True)


def python(code: str, *arguments: str) -> str:
    """The last line that the code prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
