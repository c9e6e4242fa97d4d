"""Quantized imports: the blobs, the cache, the report."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from folders import raw_shard, tensor, write_component, write_model
from modelcask import facts, paired_sha256, range_store
from modelcask.errors import InvalidModelFolder
from modelcask.manifests import REPORT_TYPE, TENSOR_TYPE, Manifest
from modelcask.names import ModelName
from modelcask.quantize import QUANT_TYPES, SOURCE_DTYPES, eligible
from modelcask.quantize.arrays import BIT_DTYPES, Quantized
from modelcask.quantize.reference import dequantize
from modelcask.store import Store
from running import blob_files, import_folder

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "mlx.json").read_text())["tensors"]
TYPES = list(QUANT_TYPES)


def quantized(store: Store, folder: Path, qtype: str, **options: Any) -> Manifest:
    (result,) = import_folder(store, folder, quantize=qtype, **options)
    return store.manifests.read(result.name).manifest


def parsed(store: Store, manifest: Manifest, layer_name: str) -> tuple[dict[str, Any], bytes]:
    """Header and data of a tensor's blob."""
    layer = next(each for each in manifest.of_type(TENSOR_TYPE) if each.name == layer_name)
    blob = store.blobs.read(layer.digest, layer.size)
    (length,) = struct.unpack("<Q", blob[:8])
    assert (8 + length) % 8 == 0
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


@pytest.mark.parametrize("qtype", TYPES)
def test_every_eligible_tensor_has_mlxs_bits_and_all_else_is_as_it_came(
    store: Store, vector_model: Path, qtype: str
) -> None:
    plain = import_folder(store, vector_model)[0].name
    unquantized = {each.name: each for each in store.manifests.read(plain).manifest.of_type(TENSOR_TYPE)}
    manifest = quantized(store, vector_model, qtype)
    expected = VECTORS[qtype]
    for layer in manifest.of_type(TENSOR_TYPE):
        if layer.name not in expected:
            assert layer == unquantized[layer.name]
            continue
        header, data = parsed(store, manifest, layer.name)
        name = layer.name.partition("/")[2]
        assert header.pop("__metadata__") == {
            "quant_type": qtype,
            "group_size": str(QUANT_TYPES[qtype].group_size),
        }
        keys = {name: "weight", name + ".scale": "scale", name + ".bias": "bias"}
        assert list(header) == [key for key in keys if keys[key] in expected[layer.name]]
        end = 0
        for key, fields in header.items():
            begin, stop = fields["data_offsets"]
            assert begin == end
            assert hashlib.sha256(data[begin:stop]).hexdigest() == expected[layer.name][keys[key]]
            end = stop
        assert header[name]["dtype"] == "U32"
        assert end == len(data)
    assert set(expected) == {each.name for each in manifest.of_type(TENSOR_TYPE)} & set(expected)


def test_the_tag_is_the_type_where_the_name_is_the_folders(store: Store, vector_model: Path) -> None:
    names = [
        str(import_folder(store, vector_model, quantize="int4", **options)[0].name)
        for options in ({}, {"name": "org/x"}, {"name": "org/x:mine"}, {"namespace": "lab"})
    ]
    assert names == ["library/model:int4", "org/x:latest", "org/x:mine", "lab/model:int4"]


def test_model_index_says_what_it_is_quantized_to(store: Store, vector_model: Path) -> None:
    import_folder(store, vector_model, quantize="nvfp4")
    summary = facts.summarize(store, store.manifests.read(ModelName.parse("model:nvfp4")))
    assert summary.quantization == "NVFP4"


def test_only_default_weights_are_quantized_unless_a_variant_is_chosen(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", variants=["fp16"])
    (default,) = import_folder(store, folder, quantize="int4")
    (half,) = import_folder(store, folder, quantize="int4", variant="fp16", name="half")
    assert [each.path for each in default.skipped] == ["transformer/diffusion_pytorch_model.fp16.safetensors"]
    assert [each.path for each in half.skipped] == ["transformer/diffusion_pytorch_model.safetensors"]
    assert default.manifest != half.manifest


def test_a_folder_without_default_weights_asks_for_a_variant(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    shard = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shard.rename(shard.with_suffix(".fp16.safetensors"))
    with pytest.raises(InvalidModelFolder, match=r"--variant \(fp16\)"):
        import_folder(store, folder, quantize="int4")


def test_what_was_quantized_before_is_neither_quantized_nor_written_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two", encoder_shards=2)
    first = quantized(store, one, "int4")
    before = blob_files(store.root)
    monkeypatch.setattr(range_store, "_QuantizedFile", None)  # whatever would be quantized fails
    second = quantized(store, two, "int4")
    added = blob_files(store.root).keys() - before.keys()
    tensors = {each.digest.blob_name for each in second.of_type(TENSOR_TYPE)}
    assert not added & tensors
    assert {each.digest for each in first.of_type(REPORT_TYPE)} == {each.digest for each in second.of_type(REPORT_TYPE)}


def test_the_memory_of_what_was_quantized_is_not_trusted(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    manifest = quantized(store, folder, "int4")
    quantized_layers = [each for each in manifest.of_type(TENSOR_TYPE) if each.name.startswith("transformer/")]
    missing, short = (store.blobs.path(each.digest) for each in quantized_layers[:2])
    whole = {path: path.read_bytes() for path in (missing, short)}
    missing.unlink()
    short.chmod(0o644)
    short.write_bytes(b"short")
    assert quantized(store, folder, "int4") == manifest
    assert {path: path.read_bytes() for path in (missing, short)} == whole


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("dtype", list(SOURCE_DTYPES))
def test_a_tensor_larger_than_the_buffer_is_streamed_to_the_same_blob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qtype: str, dtype: str
) -> None:
    folder = write_model(tmp_path / "m")
    weights = {"x.weight": tensor("x", 300, 128, dtype=dtype), "embed.weight": tensor("e", 64, 64, dtype=dtype)}
    write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    whole = Store.create(tmp_path / "whole")
    expected = quantized(whole, folder, qtype)
    monkeypatch.setattr(range_store, "_BUFFER", 8192)
    monkeypatch.setattr(range_store, "_PIECE", 4096)
    monkeypatch.setattr(range_store, "_SAMPLE", 512)
    monkeypatch.setattr(range_store, "_WORTH_A_LANE", 0)
    monkeypatch.setattr(paired_sha256, "_PAYS", 0)
    streamed = Store.create(tmp_path / "streamed")
    assert list(quantized(streamed, folder, qtype).of_type(TENSOR_TYPE)) == list(expected.of_type(TENSOR_TYPE))
    # Recognized by its samples, and by them alone: not written again.
    monkeypatch.setattr(range_store, "_QuantizedFile", None)
    monkeypatch.setattr(range_store, "_Temporary", None)
    assert list(quantized(streamed, folder, qtype).of_type(TENSOR_TYPE)) == list(expected.of_type(TENSOR_TYPE))
    for store in (whole, streamed):
        store.index.close()


@pytest.mark.parametrize("qtype", TYPES)
def test_the_error_is_what_dequantizing_shows(store: Store, tmp_path: Path, qtype: str) -> None:
    generator = np.random.default_rng(1)
    values = generator.standard_normal((64, 128), dtype=np.float32)
    folder = write_model(tmp_path / "m")
    header = json.dumps({"x.weight": {"dtype": "F32", "shape": [64, 128], "data_offsets": [0, values.nbytes]}})
    shard = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shard.write_bytes(raw_shard(header.encode(), values.tobytes()))
    manifest = quantized(store, folder, qtype)
    blob_header, data = parsed(store, manifest, "transformer/x.weight")
    parts = []
    for name, fields in blob_header.items():
        if name != "__metadata__":
            begin, end = fields["data_offsets"]
            bits = BIT_DTYPES.get(fields["dtype"], np.uint32)
            parts.append(np.frombuffer(data[begin:end], bits).reshape(fields["shape"]))
    packed, scales, *biases = parts
    made = Quantized(packed, scales, biases[0] if biases else None)
    back = dequantize(QUANT_TYPES[qtype], "F32", made).view(np.float32).reshape(values.shape)
    difference = back.astype(np.float64) - values
    expected = math.sqrt(np.sum(difference**2) / np.sum(values.astype(np.float64) ** 2))
    found = facts.tensors(store, store.manifests.read(ModelName.parse(f"m:{qtype}")))
    (each,) = [each for each in found["transformer"] if each.name == "transformer/x.weight"]
    assert each.error == pytest.approx(expected, rel=1e-9)
    assert 0.003 < expected < 0.15
    parts_ = facts.components(store, store.manifests.read(ModelName.parse(f"m:{qtype}")))
    assert [part.error for part in parts_ if part.name == "transformer"] == [pytest.approx(expected, rel=1e-9)]


def test_the_fingerprint_of_every_blob_is_its_own(store: Store, vector_model: Path) -> None:
    for qtype in ("int4", "nvfp4"):
        quantized(store, vector_model, qtype)
    paths = {path.name: xxhash.xxh3_64_intdigest(path.read_bytes()) for path in store.blobs.directory.iterdir()}
    assert {digest.blob_name: xxh3 for digest, xxh3 in store.index.fingerprints().items()} == paths


def test_every_tensor_is_quantized_or_says_why_not(store: Store, vector_model: Path) -> None:
    quantized(store, vector_model, "int8")
    for component, found in facts.tensors(store, store.manifests.read(ModelName.parse("model:int8"))).items():
        for each in found:
            name = each.name.removeprefix(component + "/")
            assert each.kept == eligible(component, name, each.dtype, each.shape, QUANT_TYPES["int8"])
            assert (each.kept is None) == (each.error is not None)


def test_tensors_that_come_quantized_are_kept_as_they_came(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = {
        "a.weight": tensor("a", 64, 64, dtype="F8_E4M3"),
        "b.qweight": tensor("b", 64, 64, dtype="U8"),
        "c.weight": tensor("c", 64, 64),
    }
    write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    manifest = quantized(store, folder, "int4")
    for name in ("a.weight", "b.qweight"):
        assert parsed(store, manifest, f"transformer/{name}")[1] == weights[name].data
    assert "__metadata__" in parsed(store, manifest, "transformer/c.weight")[0]
