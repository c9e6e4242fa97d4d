"""Import wall time against `cp -r` + `sync` of the same folder, and where the time goes.

python tests/bench/bench_import.py [--gigabytes 3] [--rounds 3] [--dir DIR] [--profile]
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
from made_models import write_model
from report import alternate, peak_rss_mib, print_machine, touch_memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    parser.add_argument("--sparse", action="store_true", help="a folder of holes: memory only, no speed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        model = work / "model"
        write_model(model, total_bytes=int(options.gigabytes * 1e9), sparse=options.sparse)
        subprocess.run(["sync"], check=True)
        warm(model)
        print_machine("source in the page cache, destination on the same filesystem")
        results: dict[str, object] = {}

        def copy() -> None:
            subprocess.run(["cp", "-r", str(model), str(work / "copy")], check=True)
            subprocess.run(["sync"], check=True)

        def clean() -> None:
            for name in ("store", "store4", "copy"):
                shutil.rmtree(work / name, ignore_errors=True)

        def first_import() -> None:
            results["first"] = run_import(model, work / "store")

        def import_again() -> None:
            results["again"] = run_import(model, work / "store")

        def import_int4() -> None:
            run_import(model, work / "store4", "--quantize", "int4")

        def import_int4_again() -> None:
            run_import(model, work / "store4", "--quantize", "int4")

        def settle() -> None:
            subprocess.run(["sync"], check=True)
            warm(model)
            touch_memory(4)

        medians = alternate(
            {
                "(clean up)": clean,
                "cp -r + sync": copy,
                "import": first_import,
                "import again": import_again,
                "import int4": import_int4,
                "import int4 again": import_int4_again,
            },
            rounds=options.rounds,
            before=settle,
        )
        peer = medians["cp -r + sync"]
        for side, median in list(medians.items())[2:]:
            print(f"{side + ' / (cp -r + sync):':45} {median / peer:.2f}")
        shutil.rmtree(work / "store")
        print(f"peak RSS of an import:      {peak_rss_mib(import_command(model, work / 'store')):.0f} MiB")
        shutil.rmtree(work / "store4")
        command = [*import_command(model, work / "store4"), "--quantize", "int4"]
        print(f"peak RSS of an int4 import: {peak_rss_mib(command):.0f} MiB")


def run_import(model: Path, store: Path, *options: str) -> object:
    """Import through the command line, as a user does."""
    done = subprocess.run([*import_command(model, store), *options], check=True, capture_output=True)
    return json.loads(done.stdout)


def import_command(model: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "modelcask", "import", str(model), "--store", str(store), "--json"]


def warm(folder: Path) -> None:
    """Read every file once."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


if __name__ == "__main__":
    main()
