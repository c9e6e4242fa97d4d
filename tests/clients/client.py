"""A real client in a process of its own, with a deadline for everything it is asked."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TESTS = Path(__file__).resolve().parents[1]
_SECONDS = 120  # Measured: 6 s for the imports, under 1 s for a load and a run (2 cores).


class ClientFailedError(Exception):
    """The client process raised, ended, or did not answer in time; the message holds what it said."""


class Client:
    """Builds and runs tiny pipelines in a child process that has diffusers imported.

    Args:
        home: an empty directory; takes the child's Hugging Face cache, its log and the images it made.
        environment: what the child's environment has beyond pytest's, set before diffusers is imported.
    """

    def __init__(self, home: Path, **environment: str) -> None:
        self._home = home
        self._images = 0
        self._log = (home / "log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clients.serve"],
            cwd=_TESTS,
            env={**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Unbuffered, so that what select() sees is all there is.
            bufsize=0,
        )
        self.loads_in_parallel: bool = self._read()["parallel"]

    def build(self, pipeline: str, folder: Path) -> None:
        """Writes the tiny pipeline of that name into `folder`."""
        self._ask({"do": "build", "pipeline": pipeline, "folder": str(folder)})

    def run(self, pipeline: str, folder: Path | str, **load: Any) -> torch.Tensor:
        """Loads `folder`, or a repository's name, with `from_pretrained(folder, **load)`; the image it makes."""
        from safetensors.torch import load_file

        self._images += 1
        image = self._home / f"{self._images}.safetensors"
        self._ask({"do": "run", "pipeline": pipeline, "folder": str(folder), "load": load, "image": str(image)})
        return load_file(image)["image"]

    def mlx_digests(
        self, shard: Path, quantization: dict[str, Any] | None, dtypes: dict[str, str]
    ) -> dict[str, dict[str, str]]:
        """What MLX finds in a shard: `mlx_reader.digests`."""
        request = {"do": "mlx_digests", "shard": str(shard), "quantization": quantization, "dtypes": dtypes}
        digests: dict[str, dict[str, str]] = self._ask(request)["digests"]
        return digests

    def shapes(self, shard: Path) -> dict[str, list[int]]:
        """The shapes of a shard's tensors, each of them read by the safetensors library."""
        shapes: dict[str, list[int]] = self._ask({"do": "shapes", "shard": str(shard)})["shapes"]
        return shapes

    def close(self) -> None:
        """Ends the child, if need be by force."""
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe(self._process.stdout).close()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._pipe(self._process.stdin).write(json.dumps(request).encode() + b"\n")
        return self._read()

    def _read(self) -> dict[str, Any]:
        answers = self._pipe(self._process.stdout)
        if not select.select([answers], [], [], _SECONDS)[0]:
            self._process.kill()
            raise ClientFailedError(f"no answer in {_SECONDS} s; its log ends:\n{self._log_end()}")
        line = answers.readline()
        if not line:
            raise ClientFailedError(f"the client ended; its log ends:\n{self._log_end()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise ClientFailedError(answer["error"])
        return answer

    def _log_end(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:].decode(errors="replace")

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe
