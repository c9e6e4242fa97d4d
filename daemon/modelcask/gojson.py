"""JSON as Go's encoding/json writes it.

Blob headers, manifests and the normalized model_index.json are hashed; their bytes must be those of
upstream's importer (a Go program). Go escapes `<`, `>`, `&`, U+2028 and U+2029 inside strings, and prints a
number that was decoded into an `any` as a float64 (https://pkg.go.dev/encoding/json#Marshal).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

# These can stand in a JSON text only inside strings, so a replacement over the whole text is exact.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def compact(value: Any) -> bytes:
    """`value` without spaces, keys in their given order; the numbers in it must be integers."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES).encode()


def indented(value: Any) -> bytes:
    """`value` as `json.MarshalIndent(value, "", "    ")` prints a decoded JSON text: keys sorted by their
    bytes, all numbers but those marked `GoInt` as float64. No newline at the end.

    Raises:
        ValueError: a number that Go cannot hold in a float64, nesting that is too deep to follow, keys that Go
            would take for one.
    """
    try:
        return _indented(value, "\n").encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class GoInt(int):
    """An integer that Go held in an int64 and so prints in full."""


def _indented(value: Any, newline: str) -> str:
    deeper = newline + "    "
    if isinstance(value, Mapping):
        if not value:
            return "{}"
        named = {_replaced(key): item for key, item in value.items()}
        if len(named) != len(value):
            raise ValueError("two of its keys differ in lone surrogates only")
        items = (f"{_string(key)}: {_indented(named[key], deeper)}" for key in sorted(named))
        return "{" + deeper + ("," + deeper).join(items) + newline + "}"
    if isinstance(value, list):
        if not value:
            return "[]"
        return "[" + deeper + ("," + deeper).join(_indented(item, deeper) for item in value) + newline + "]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, GoInt | bool | None):
        return json.dumps(value)
    return _float64(value)


def _replaced(text: str) -> str:
    """Go's decoder turns a lone surrogate escape into U+FFFD."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _string(value: str) -> str:
    return json.dumps(_replaced(value), ensure_ascii=False).translate(_ESCAPES)


def _float64(value: int | float) -> str:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a number in it is too large for a float64")
    if number == 0:
        return "-0" if math.copysign(1, number) < 0 else "0"
    sign, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)
    if 1e-6 <= abs(number) < 1e21:
        return format(Decimal((sign, digits, exponent)), "f")
    exponent += len(digits) - 1
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if len(digits) > 1 else "")
    return f"{'-' if sign else ''}{mantissa}e{exponent:+}"
