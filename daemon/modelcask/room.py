"""Whether an import can fit, told before anything of it is read.

A folder may hold a file of a terabyte, without taking a byte of the disk it lies on; that the store's disk is too
small for it should not be found out by reading it until that is full.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from modelcask.plan import ImportPlan
from modelcask.quantize import eligible, quantized_layout
from modelcask.safetensors_layout import blob_header
from modelcask.store import Store

# Smaller blobs are not counted: a model has thousands, and they decide nothing.
_SMALL = 1 << 20


def check_room(store: Store, plan: ImportPlan) -> None:
    """Refuse an import that cannot fit: a blob of a size that no stored one has is new for certain.

    Counts each size once, for tensors may be equal; so it may let pass what does not fit, and never refuses what
    does, but on filesystems that compress.

    Raises:
        OSError: ENOSPC, with the bytes that are needed and free.
    """
    sizes = {size for size in _blob_sizes(plan) if size >= _SMALL}
    needed = sum(sizes - {size for _, size in store.blobs.enumerate()}) if sizes else 0
    status = os.statvfs(store.root)
    free = (status.f_bfree if os.geteuid() == 0 else status.f_bavail) * status.f_frsize
    if needed > free:
        what = f"no space left on device for {needed / 1e6:,.0f} MB at least, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, what, str(store.root))


def _blob_sizes(plan: ImportPlan) -> Iterator[int]:
    qtype = plan.quantize
    for model in plan.models:
        yield from (file.size for file in model.files)
        for shard in model.shards:
            for tensor in shard.layout.tensors:
                if tensor.nbytes < _SMALL:
                    continue
                name, dtype, shape = tensor.name, tensor.dtype, tensor.shape
                if qtype is None or eligible(shard.component, name, dtype, shape, qtype) is not None:
                    yield len(blob_header(name, dtype, shape, tensor.nbytes)) + tensor.nbytes
                else:
                    yield quantized_layout(name, dtype, shape, qtype).size
