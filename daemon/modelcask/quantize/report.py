"""What quantizing a model cost, kept with it: per tensor the squared error against the source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelcask import gojson
from modelcask.errors import InvalidManifest
from modelcask.quantize.types import KERNEL_VERSION, QUANT_TYPES, QuantType
from modelcask.safetensors_layout import strict_json


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """The quantized tensors of one model.

    Attributes:
        costs: by layer name, `component/tensor.name`: the sum of (dequantized - source)² and that of source².
    """

    qtype: QuantType
    costs: Mapping[str, tuple[float, float]]

    def encode(self) -> bytes:
        """The bytes of the report's blob: JSON, tensors by name."""
        tensors = {name: list(self.costs[name]) for name in sorted(self.costs)}
        fields = {"quant_type": self.qtype.name, "kernel_version": KERNEL_VERSION, "tensors": tensors}
        return gojson.compact(fields)

    @classmethod
    def decode(cls, data: bytes, where: Path) -> QuantizationReport:
        """The report in `data`. Raises InvalidManifest, naming `where`, for anything else."""
        try:
            fields = strict_json(data)
            qtype = QUANT_TYPES[fields["quant_type"]]
            costs = {name: (float(error), float(norm)) for name, (error, norm) in fields["tensors"].items()}
            for name in costs:
                name.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
            if not all(0 <= number < math.inf for cost in costs.values() for number in cost):
                raise ValueError("a sum of squares that is none")
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InvalidManifest(where, f"its quantization report cannot be read: {error!r}") from None
        return cls(qtype, costs)

    def relative_error(self, names: Iterable[str]) -> float:
        """The root mean square of the error of these tensors together over that of their sources."""
        costs = [self.costs[name] for name in names if name in self.costs]
        error, norm = math.fsum(cost[0] for cost in costs), math.fsum(cost[1] for cost in costs)
        if error == 0:
            return 0.0
        return math.sqrt(error / norm) if norm else math.inf
