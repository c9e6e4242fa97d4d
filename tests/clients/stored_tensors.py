"""What a store must hold of a model's tensors, computed from its safetensors files alone.

Written from the description of the blob format, on purpose without the product's code, so that the two check
each other. A tensor's blob is `uint64 header length | header | data`; the header is JSON without spaces,
padded with spaces to a multiple of eight bytes; its key is the tensor's name without the component.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def tensor_blobs(files: Iterable[Path]) -> dict[str, int]:
    """The distinct tensor blobs of safetensors files: sha256 in hex to size in bytes."""
    return {hashlib.sha256(blob).hexdigest(): len(blob) for file in files for blob in _blobs(file.read_bytes())}


def tensor_count(files: Iterable[Path]) -> int:
    """How many tensors the files hold, equal ones counted each time."""
    return sum(1 for file in files for _ in _blobs(file.read_bytes()))


def _blobs(content: bytes) -> Iterable[bytes]:
    header_end = 8 + int.from_bytes(content[:8], "little")
    for name, tensor in json.loads(content[8:header_end]).items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        entry = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [0, end - begin]}
        header = json.dumps({name: entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        yield len(header).to_bytes(8, "little") + header + content[header_end + begin : header_end + end]
