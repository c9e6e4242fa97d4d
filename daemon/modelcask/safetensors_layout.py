"""The layout of safetensors files: what the header says, checked before anything believes it.

A file is `uint64 LE header length | JSON header | data`. The header maps each tensor's name to its dtype,
shape and `data_offsets` within the data. The rules checked here are those of the format's reference
implementation (https://github.com/huggingface/safetensors, safetensors/src/tensor.rs, 0.8) plus those its
README states and the implementation leaves to the JSON parser (no duplicate keys).

No tensor data passes through this module, and numpy is not needed for it.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcask import gojson
from modelcask.errors import InvalidSafetensors

MAX_HEADER = 100_000_000

# Of one JSON text. Python takes up to 200 bytes for a value of three: 100 MB of empty lists would be 2.5 GB. A
# tokenizer of 262,144 words has some two million, a shard of ten thousand tensors eighty thousand.
MAX_VALUES = 5_000_000

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

# Names that JSON writes as they are.
_PLAIN = re.compile(r"[A-Za-z0-9_./ -]*")
_LFS_POINTER = b"version https://git-lfs"
_TRUNCATED = "download it again, it is not complete"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        begin, end: byte range within the data section.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A checked header.

    Attributes:
        header: the JSON bytes as they stand in the file, padding included, without the eight length bytes.
        tensors: by offset; together they cover the data section without hole or overlap.
    """

    header: bytes
    tensors: tuple[TensorEntry, ...]

    @property
    def data_start(self) -> int:
        """Offset of the data section in the file."""
        return 8 + len(self.header)

    @property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return self.tensors[-1].end if self.tensors else 0


def read_layout(fd: int, where: Path) -> ShardLayout:
    """The checked layout of the open file `fd`.

    Reads the header with pread and nothing else. `where` is named in errors.

    Raises:
        InvalidSafetensors: any rule is broken; a Git-LFS pointer and a truncated file are told as such.
    """
    size = os.fstat(fd).st_size
    start = os.pread(fd, 64, 0)
    if start.startswith(_LFS_POINTER):
        raise InvalidSafetensors(
            where, "is a Git-LFS pointer, not the weights", "run `git lfs pull` in the folder it came from"
        )
    if size < 8:
        raise InvalidSafetensors(where, f"is {size} bytes long, too short for a safetensors file", _TRUNCATED)
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise InvalidSafetensors(
            where,
            f"says that its header is {length} bytes long, more than the {MAX_HEADER} the format allows",
        )
    if 8 + length > size:
        raise InvalidSafetensors(where, f"ends within its header ({size} of at least {8 + length} bytes)", _TRUNCATED)
    layout = parse_header(_pread_all(fd, length, 8), where)
    expected = layout.data_start + layout.data_size
    if size < expected:
        raise InvalidSafetensors(where, f"is truncated: {size} of the {expected} bytes its header lists", _TRUNCATED)
    if size > expected:
        raise InvalidSafetensors(where, f"has {size - expected} bytes behind the {expected} its header lists")
    return layout


def parse_header(header: bytes, where: Path) -> ShardLayout:
    """The checked layout that the JSON `header` describes; the file's length is the caller's to compare.

    Raises:
        InvalidSafetensors: any rule is broken.
    """

    def invalid(reason: str) -> InvalidSafetensors:
        return InvalidSafetensors(where, f"has an invalid header: {reason}")

    if not header.startswith(b"{"):
        raise invalid("it does not begin with '{'")
    try:
        fields = strict_json(header)
    except ValueError as error:
        raise invalid(str(error)) from None
    tensors = []
    for name, info in fields.items():
        if name == "__metadata__":
            if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
                raise invalid("__metadata__ is not a map of strings to strings")
            continue
        try:
            tensors.append(_tensor_entry(name, info))
        except ValueError as error:
            raise invalid(f"tensor {name[:200]!r}: {error}") from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            kind = "overlaps the one before" if tensor.begin < end else "leaves a hole before it"
            raise invalid(f"tensor {tensor.name[:200]!r} {kind} (begins at {tensor.begin}, expected {end})")
        end = tensor.end
    return ShardLayout(header, tuple(tensors))


def blob_header(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """The bytes that stand before a single tensor's data in its blob, the eight length bytes included.

    They are those upstream's importer writes, and those of `encode_header`; a mount needs thousands to open a shard.
    """
    key = f'"{name}"' if _PLAIN.fullmatch(name) else gojson.compact(name).decode()
    sizes = ",".join(map(str, shape))
    return _padded(f'{{{key}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[0,{nbytes}]}}}}'.encode(), 8)


def encode_header(
    tensors: Iterable[TensorEntry], *, metadata: Mapping[str, str] | None = None, alignment: int = 8
) -> bytes:
    """The bytes that stand before the data of `tensors`, the eight length bytes included.

    The JSON is Go's, keys in the order given, padded with spaces so that the data begins at a multiple of
    `alignment` (which divides by eight).
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for tensor in tensors:
        offsets = [tensor.begin, tensor.end]
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    return _padded(gojson.compact(fields), alignment)


def _padded(text: bytes, alignment: int) -> bytes:
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text


def strict_json(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`, by the letter of RFC 8259, without duplicate keys at any depth.

    Raises:
        ValueError: says in a few words what is wrong.
    """
    check_size(text)
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except _NotStrict:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError("a number in it has too many digits") from None  # sys.get_int_max_str_digits()
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def check_size(text: bytes) -> None:
    """Raise ValueError if parsing `text` as JSON could take more than a gigabyte."""
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES} values")


def _tensor_entry(name: str, info: Any) -> TensorEntry:
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError("its dtype is not text")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype[:50]!r}")
    if not _are_sizes(shape):
        raise ValueError("its shape is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets are not two offsets in order")
    _check_utf8(name)
    bits = _elements(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"its {bits} bits do not fill whole bytes")
    if bits // 8 != offsets[1] - offsets[0]:
        raise ValueError(
            f"{dtype} {str(shape)[:200]} takes {bits // 8} bytes, its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    # bool is an int to isinstance; 2^63 bounds what any reader can address.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _elements(shape: list[int]) -> int:
    # As the reference does, and not math.prod: the product of a million sizes would take hours.
    count = 1
    for size in shape:
        count *= size
        if count >= 1 << 64:
            raise ValueError("its shape is too large")
    return count


def _check_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name holds a lone surrogate") from None


class _NotStrict(ValueError):
    """Python's parser takes it, RFC 8259 does not."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrict(f"the key {key[:200]!r} stands twice")
    return unique


def _no_constant(constant: str) -> None:
    raise _NotStrict(f"it is not JSON ({constant})")


def _pread_all(fd: int, length: int, offset: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)
