"""The views of a quantized model, without a mount; real clients read them in tests/clients."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize

from folders import raw_shard, tensor, write_component, write_model
from modelcask.quantize import QUANT_TYPES
from modelcask.store import Store
from modelcaskfs.nodes import FileNode
from modelcaskfs.reader import SpanReader
from modelcaskfs.views import Tree
from running import import_folder
from trees import content, find, names, walk

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "mlx.json").read_text())["tensors"]
TYPES = list(QUANT_TYPES)


def shards(store: Store, view: str, model: str) -> dict[str, bytes]:
    folder = find(Tree(store), f"{view}/{model}")
    assert folder is not None
    return {str(p): content(store, node) for p, node in walk(folder).items() if p.suffix == ".safetensors"}  # type: ignore[arg-type]


def header_and_data(shard: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", shard[:8])
    return json.loads(shard[8 : 8 + length]), shard[8 + length :]


@pytest.mark.parametrize("qtype", TYPES)
def test_diffusers_has_the_dropped_headers_and_what_mlx_dequantizes(
    store: Store, vector_model: Path, qtype: str
) -> None:
    import_folder(store, vector_model, quantize=qtype)
    met = set()
    for path, shard in shards(store, "diffusers", f"library/model/{qtype}").items():
        dropped = (vector_model / path).read_bytes()
        assert len(shard) == len(dropped)
        header, data = header_and_data(shard)
        _, dropped_data = header_and_data(dropped)
        assert shard[: len(shard) - len(data)] == dropped[: len(dropped) - len(dropped_data)]
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            begin, end = fields["data_offsets"]
            full_name = f"{PurePosixPath(path).parent}/{name}"
            if full_name in VECTORS[qtype]:
                met.add(full_name)
                assert hashlib.sha256(data[begin:end]).hexdigest() == VECTORS[qtype][full_name]["dequantized"]
            else:
                assert data[begin:end] == dropped_data[begin:end]
    assert met == set(VECTORS[qtype])


@pytest.mark.parametrize("view", ["mlx", "sdnq"])
@pytest.mark.parametrize("qtype", TYPES)
def test_packed_views_have_valid_headers_over_the_blobs_bytes(
    store: Store, vector_model: Path, qtype: str, view: str
) -> None:
    import_folder(store, vector_model, quantize=qtype)
    for path, shard in shards(store, view, f"library/model/{qtype}").items():
        deserialize(shard)  # the reference implementation refuses holes and overlaps
        header, data = header_and_data(shard)
        assert (len(shard) - len(data)) % 4096 == 0
        assert header["__metadata__"] == {"format": "mlx" if view == "mlx" else "pt"}
        if view == "mlx":
            for name in (name for name in header if name.endswith(".scales")):
                weight = name.removesuffix("scales") + "weight"
                begin, end = header[weight]["data_offsets"]
                expected = VECTORS[qtype][f"{PurePosixPath(path).parent}/{weight}"]
                assert hashlib.sha256(data[begin:end]).hexdigest() == expected["weight"]
    index = find(
        Tree(store), f"{view}/library/model/{qtype}/transformer/diffusion_pytorch_model.safetensors.index.json"
    )
    weight_map = json.loads(content(store, index))["weight_map"]  # type: ignore[arg-type]
    found = {
        name: PurePosixPath(path).name
        for path, shard in shards(store, view, f"library/model/{qtype}").items()
        for name in header_and_data(shard)[0]
        if path.startswith("transformer/") and name != "__metadata__"
    }
    assert weight_map == found


def test_a_tensor_whose_parts_names_are_taken_stays_as_dropped(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = {name: tensor(name, 64, 64) for name in ("x.weight", "y.weight")}
    taken = {name: tensor(name, 3) for name in ("x.scales", "x.scale")}
    write_component(folder / "transformer", [weights, taken], stem="diffusion_pytorch_model")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    import_folder(store, folder, quantize="int4")
    for view, added in (("mlx", {"y.scales", "y.biases"}), ("sdnq", {"y.scale", "y.zero_point"})):
        names_ = {
            name: fields["dtype"]
            for path, shard in shards(store, view, "library/m/int4").items()
            if path.startswith("transformer/")
            for name, fields in header_and_data(shard)[0].items()
            if name != "__metadata__"
        }
        assert set(names_) == {*weights, *taken, *added}
        assert names_["x.weight"] == "BF16"


def test_configs_of_quantized_components_say_so_and_others_stay(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_component(folder / "transformer", [{"x.weight": tensor("x", 64, 64)}], stem="diffusion_pytorch_model")
    import_folder(store, folder, quantize="int8")
    tree = Tree(store)

    def config(view: str, component: str) -> dict[str, Any]:
        node = find(tree, f"{view}/library/m/int8/{component}/config.json")
        assert node is not None
        return json.loads(content(store, node))  # type: ignore[no-any-return]

    assert config("mlx", "transformer") == {
        "torch_dtype": "bfloat16",
        "quantization": {"group_size": 64, "bits": 8, "mode": "affine"},
    }
    assert config("sdnq", "transformer")["quantization_config"]["weights_dtype"] == "uint8"
    for view in ("mlx", "sdnq"):
        assert config(view, "vae") == {"torch_dtype": "bfloat16"}
        assert config(view, "text_encoder") == {"torch_dtype": "bfloat16"}  # its rows are shorter than a group
    assert config("diffusers", "transformer") == {"torch_dtype": "bfloat16"}


def test_a_model_that_is_not_quantized_is_not_listed_among_the_packed(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    import_folder(store, folder, name="plain/m")
    import_folder(store, folder, name="org/m")
    import_folder(store, folder, quantize="int4", name="org/m:int4")
    tree = Tree(store)
    for view in ("mlx", "sdnq"):
        assert names(tree, view) == ["org"]
        assert names(tree, f"{view}/org/m") == ["int4"]
        assert find(tree, f"{view}/org/m/latest") is None
        assert find(tree, f"{view}/plain") is None
    assert names(tree, "diffusers/org/m") == ["int4", "latest"]
    store.manifests.remove(next(name for name in store.manifests.names() if name.tag == "int4"))
    assert names(tree, "mlx") == []


def test_levels_that_read_manifests_to_find_a_name_may_wait(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"), quantize="int4", name="org/m:int4")
    tree = Tree(store)
    for view, levels in (("diffusers", [False, False, True]), ("mlx", [True] * 3), ("sdnq", [True] * 3)):
        found = [find(tree, view + path) for path in ("", "/org", "/org/m")]
        assert [node.may_wait for node in found] == levels  # type: ignore[union-attr]


@pytest.mark.parametrize("qtype", TYPES)
def test_ranged_reads_of_dequantized_files_equal_slices_for_sixteen_readers(
    store: Store, tmp_path: Path, qtype: str
) -> None:
    folder = write_model(tmp_path / "m")
    weights = {f"{dtype}.weight": tensor(dtype, 700, 1920, dtype=dtype) for dtype in ("F32", "F16", "BF16")}
    write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    import_folder(store, folder, quantize=qtype)
    node = find(Tree(store), f"diffusers/library/m/{qtype}/transformer/diffusion_pytorch_model.safetensors")
    assert isinstance(node, FileNode)
    whole = content(store, node)
    reader = SpanReader(store.blobs, max_open=4)
    wrong: list[tuple[int, int]] = []

    def read_at_random(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            offset = rng.randrange(len(whole) + 100)
            length = rng.choice((1, 7, 4096, 65_535, 65_536, 131_072, 3_000_000))
            buffer = bytearray(length)
            count = reader.read_cached(node.content, offset, memoryview(buffer))
            if count is None:
                count = reader.read(node.content, offset, memoryview(buffer))
            if buffer[:count] != whole[offset : offset + length]:
                wrong.append((offset, length))

    threads = [threading.Thread(target=read_at_random, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert wrong == []


@pytest.mark.parametrize("qtype", ["nvfp4", "mxfp8"])
def test_a_blob_that_two_dtypes_share_is_read_in_each_ones_own(store: Store, tmp_path: Path, qtype: str) -> None:
    words = np.random.default_rng(0).integers(0x3C00, 0x4000, (1024, 1024), np.uint16)
    for dtype, values in (("BF16", words), ("F32", words.astype(np.uint32) << 16)):
        folder = write_model(tmp_path / dtype.lower())
        header = {"x.weight": {"dtype": dtype, "shape": [1024, 1024], "data_offsets": [0, values.nbytes]}}
        shard = raw_shard(json.dumps(header).encode(), values.tobytes())
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(shard)
        import_folder(store, folder, quantize=qtype)
    tree = Tree(store)
    path = f"{qtype}/transformer/diffusion_pytorch_model.safetensors"
    found = [find(tree, f"diffusers/library/{dtype}/{path}") for dtype in ("bf16", "f32")]
    alone = [content(store, node) for node in found if node]
    digests = [
        {each.digest for each in store.manifests.read(name).manifest.layers if each.name == "transformer/x.weight"}
        for name in store.manifests.names()
    ]
    assert digests[0] == digests[1]
    reader = SpanReader(store.blobs, max_open=4)
    for step in (1 << 20, 128 << 10, 4096):
        for offset in range(0, 4 << 20, max(step, 128 << 10)):
            for node, whole in zip(found, alone, strict=True):
                assert isinstance(node, FileNode)
                buffer = bytearray(step)
                count = reader.read(node.content, offset, memoryview(buffer))
                assert buffer[:count] == whole[offset : offset + step]
    reader.close()
