"""The plan of an import: which manifests a model folder becomes, and from which of its files.

Planning reads model_index.json and the headers of the shards, and checks all that can be checked before a
byte is stored. Weights with a variant (`….fp16.safetensors`) become a tag of their own, which shares all
other files and the components that have no such variant.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from modelcask import source
from modelcask.errors import InvalidModelFolder
from modelcask.manifests import MODEL_INDEX
from modelcask.names import DEFAULT_NAMESPACE, DEFAULT_TAG, ModelName
from modelcask.quantize import QUANT_TYPES, QuantType
from modelcask.safetensors_layout import MAX_HEADER, ShardLayout, read_layout, strict_json
from modelcask.source import LeftOut, SourceFile, SourceFolder

MAX_JSON = 64 << 20

# Real folders have two. Each is a manifest of its own, which lists everything.
_MAX_VARIANTS = 32

# Upstream's importer took these three, in this order; all others follow by name.
_FIRST_COMPONENTS = ("text_encoder", "transformer", "vae")

# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors (transformers, diffusers ≥ 0.28)
# and model-00001-of-00002.fp16.safetensors (diffusers before).
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<early>[A-Za-z0-9_]+))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<late>[A-Za-z0-9_]+))?"
    r"\.safetensors"
)
# model.safetensors.index.json, model.safetensors.index.fp16.json, model.safetensors.fp16.index.json
_WEIGHTS_INDEX = re.compile(
    r"(?P<stem>[^.]+)\.safetensors(?:\.(?P<early>[A-Za-z0-9_]+))?\.index(?:\.(?P<late>[A-Za-z0-9_]+))?\.json"
)


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file of a component.

    Attributes:
        component: the folder it lies in, `text_encoder` or deeper.
        variant: `fp16` and the like, None for the default weights.
    """

    file: SourceFile
    component: str
    variant: str | None
    layout: ShardLayout


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One manifest to be.

    Attributes:
        shards: in the order of the manifest's tensor layers.
        files: everything else, by path; model_index.json among them.
        left_out: what of the folder is in none of the manifests.
    """

    name: ModelName
    shards: tuple[Shard, ...]
    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...]
    model_index: Mapping[str, Any]

    @property
    def source_bytes(self) -> int:
        return sum(shard.file.size for shard in self.shards) + sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """All manifests of one folder."""

    folder: SourceFolder
    quantize: QuantType | None
    models: tuple[ModelPlan, ...]


def plan_import(
    folder: SourceFolder,
    *,
    name: str | None = None,
    namespace: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
) -> ImportPlan:
    """Plan the import of `folder`.

    Args:
        name: the model's name; by default the folder's (for a Hugging Face snapshot, its repository's).
        namespace: goes before a name taken from the folder.
        variant: import only the weights of this variant.
        quantize: the type to quantize to. Then only one manifest is made, of the default weights or of
            `variant`, and its tag, where the name has to be made, is the type.

    Raises:
        InvalidModelFolder: no model_index.json, a component or shard missing, no such variant.
        InvalidSafetensors: a shard breaks a rule of its format.
        InvalidName: `name` is none.
    """
    model_index = read_model_index(folder)
    check_numbered_shards(folder)
    shards = _read_shards(folder)
    check_components(folder, model_index, shards)
    for index_file in folder.files:
        check_shard_index(folder, index_file)
    qtype = None if quantize is None else QUANT_TYPES[quantize]
    base, tag = _base_name(folder.root, name=name, namespace=namespace)
    if qtype is not None:
        tag = tag or (qtype.name if name is None else DEFAULT_TAG)
    models = [
        _plan_model(folder, model_index, shards, chosen, base.with_tag(tag) if qtype else _tagged(base, tag, chosen))
        for chosen in _choose_variants(folder, shards, variant, quantized=qtype is not None)
    ]
    imported = {file.path for model in models for file in _all_files(model)}
    why = _why_unused(variant, quantized=qtype is not None)
    unused = [LeftOut(str(file.path), why) for file in folder.files if file.path not in imported]
    left_out = tuple(sorted((*folder.left_out, *unused), key=lambda entry: entry.path))
    return ImportPlan(folder, qtype, tuple(replace(model, left_out=left_out) for model in models))


def read_model_index(folder: SourceFolder) -> dict[str, Any]:
    """The parsed model_index.json of `folder`. Raises InvalidModelFolder where it is missing or no JSON."""
    file = folder.by_path().get(PurePosixPath(MODEL_INDEX))
    if file is None:
        raise InvalidModelFolder(
            folder.root,
            f"has no {MODEL_INDEX}",
            "give the folder of a diffusers pipeline (what save_pretrained wrote or the hub holds)",
        )
    try:
        return strict_json(source.read(file, limit=MAX_JSON))
    except ValueError as error:
        raise InvalidModelFolder(file.host, f"cannot be read: {error}", "download it again") from None


def component_classes(model_index: Mapping[str, Any]) -> dict[str, str]:
    """The components that `model_index` names, with their class: `["diffusers", "AutoencoderKL"]`.

    Entries that are null, options (`"requires_safety_checker": true`) and `_class_name` are none. A list of
    such pairs (several ControlNets) counts as one component of the first one's class.
    """
    components = {}
    for name, value in model_index.items():
        pair = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
        if name.startswith("_") or not isinstance(pair, list) or len(pair) < 2:
            continue
        library, class_name = pair[:2]
        if isinstance(library, str) and isinstance(class_name, str):
            components[name] = class_name
    return components


def check_components(folder: SourceFolder, model_index: Mapping[str, Any], shards: Iterable[Shard]) -> None:
    """Check that every component that `model_index` names is there with what its kind needs.

    Raises:
        InvalidModelFolder: names the component and what it lacks.
    """
    with_weights = {shard.component for shard in shards}
    in_folder: dict[str, set[str]] = defaultdict(set)
    for file in folder.files:
        in_folder[file.path.parts[0]].add("/".join(file.path.parts[1:]))
    for component, class_name in component_classes(model_index).items():
        where = folder.root / component
        if "/" in component or component in ("", ".", ".."):
            raise InvalidModelFolder(
                folder.root / MODEL_INDEX,
                f"names the component {component!r}, which is no folder's name",
                "correct it",
            )
        if component not in in_folder:
            raise InvalidModelFolder(
                where, f"is missing, {MODEL_INDEX} names it ({class_name})", "complete the download"
            )
        wanted, is_model = _needs(class_name)
        if not in_folder[component] & wanted:
            raise InvalidModelFolder(where, f"holds no {' or '.join(sorted(wanted))}", "complete the download")
        if "Tokenizer" in class_name and _lacks_merges(in_folder[component]):
            raise InvalidModelFolder(where, "holds vocab.json without its merges.txt", "complete the download")
        if is_model and component not in with_weights:
            others = [entry.path for entry in folder.left_out if entry.path.startswith(component + "/")]
            if others:
                raise InvalidModelFolder(
                    where,
                    f"has weights in no format but {', '.join(others[:3])}",
                    "save the pipeline with safe_serialization=True, or download its safetensors files",
                )
            raise InvalidModelFolder(where, "holds no weights (*.safetensors)", "complete the download")


def check_numbered_shards(folder: SourceFolder) -> None:
    """Check that of shards named `…-00001-of-00003.safetensors` all three are there, and the index that clients need.

    Raises:
        InvalidModelFolder: names the first that is missing.
    """
    present = folder.by_path()
    indexed = {
        (path.parent, match["stem"]) for path in present if (match := _WEIGHTS_INDEX.fullmatch(path.name)) is not None
    }
    checked: set[PurePosixPath] = set()
    for path in present:
        match = _WEIGHTS.fullmatch(path.name)
        if match is None or match["shard"] is None:
            continue
        total = match["shard"][-5:]
        # Once for all that belong together: there may be 99,999.
        family = path.parent / path.name.replace(match["shard"], f"-of-{total}")
        if family in checked:
            continue
        checked.add(family)
        for number in range(1, int(total) + 1):
            sibling = path.parent / path.name.replace(match["shard"], f"-{number:05}-of-{total}")
            if sibling not in present:
                raise InvalidModelFolder(
                    folder.root / sibling, f"is missing, {path.name} is one of {int(total)}", "complete the download"
                )
        if int(total) > 1 and (path.parent, match["stem"]) not in indexed:
            raise InvalidModelFolder(
                folder.root / path.parent / f"{match['stem']}.safetensors.index.json",
                f"is missing, {path.name} is one of {int(total)}",
                "complete the download",
            )


def check_shard_index(folder: SourceFolder, file: SourceFile) -> None:
    """Check that every shard that an `….safetensors.index.json` lists is there; other files pass.

    Raises:
        InvalidModelFolder: names the shard that is missing, or the index that cannot be read.
    """
    if not _WEIGHTS_INDEX.fullmatch(file.path.name):
        return
    try:
        weight_map = strict_json(source.read(file, limit=MAX_JSON)).get("weight_map")
    except ValueError as error:
        raise InvalidModelFolder(file.host, f"cannot be read: {error}", "download it again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidModelFolder(file.host, "has no weight_map of tensors to shards", "download it again")
    present = folder.by_path()
    for shard in sorted(set(weight_map.values())):
        if file.path.parent / shard not in present:
            raise InvalidModelFolder(
                folder.root / file.path.parent / shard,
                f"is missing, {file.path.name} lists it",
                "complete the download",
            )


def _lacks_merges(files: set[str]) -> bool:
    """Whether a tokenizer has only one of the two files of a byte-pair vocabulary: it would be wrong silently."""
    return "vocab.json" in files and not files & {"merges.txt", "tokenizer.json", "source.spm"}


def _needs(class_name: str) -> tuple[set[str], bool]:
    """The files of which a component of this class needs one, and whether it has weights."""
    if "Scheduler" in class_name:
        return {"scheduler_config.json"}, False
    if "Tokenizer" in class_name:
        return {"tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "vocab.txt"}, False
    # CLIPFeatureExtractor, CLIPImageProcessor, CLIPImageProcessorPil (transformers 5 without torchvision), …
    if "FeatureExtractor" in class_name or "Processor" in class_name:
        return {
            "preprocessor_config.json",
            "processor_config.json",
            "config.json",
            "tokenizer_config.json",
        }, False
    return {"config.json"}, True


def _read_shards(folder: SourceFolder) -> list[Shard]:
    """The shards with their headers, which stay in memory and so together are no longer than one may be."""
    shards, length = [], 0
    for file in folder.files:
        if file.path.suffix == ".safetensors":
            shards.append(_read_shard(file))
            length += len(shards[-1].layout.header)
            if length > MAX_HEADER:
                raise InvalidModelFolder(
                    folder.root, f"has headers of more than {MAX_HEADER} bytes together", "is this one model?"
                )
    return shards


def _read_shard(file: SourceFile) -> Shard:
    match = _WEIGHTS.fullmatch(file.path.name)
    variant = (match["early"] or match["late"]) if match else None
    with source.opened(file) as fd:
        return Shard(file, str(file.path.parent), variant, read_layout(fd, file.host))


def _base_name(root: Path, *, name: str | None, namespace: str | None) -> tuple[ModelName, str]:
    """The model's name and its tag; the tag is empty if none was given."""
    if name is not None:
        given = ModelName.parse(name)
        has_tag = ":" in name.rpartition("/")[2]
        return given, given.tag if has_tag else ""
    folder_name = root.resolve().name
    if repository := source.repository_name(root):
        organisation, _, folder_name = repository.rpartition("/")
        namespace = namespace or organisation or None
    return ModelName.from_folder_name(folder_name, namespace=namespace or DEFAULT_NAMESPACE), ""


def _tagged(base: ModelName, tag: str, variant: str | None) -> ModelName:
    if variant is None:
        return base.with_tag(tag or DEFAULT_TAG)
    return base.with_tag(f"{tag}-{variant}" if tag else variant)


def _choose_variants(
    folder: SourceFolder, shards: list[Shard], wanted: str | None, *, quantized: bool
) -> list[str | None]:
    present = sorted({shard.variant for shard in shards if shard.variant is not None})
    if wanted is not None:
        if wanted not in present:
            known = f"it has {', '.join(present)}" if present else "it has no variants"
            raise InvalidModelFolder(folder.root, f"has no weights of the variant {wanted!r}", known)
        return [wanted]
    if len(present) > _MAX_VARIANTS:
        raise InvalidModelFolder(
            folder.root, f"has {len(present)} variants of weights", "choose those to import with --variant"
        )
    by_component: dict[str, set[str | None]] = defaultdict(set)
    for shard in shards:
        by_component[shard.component].add(shard.variant)
    default_is_complete = all(None in variants for variants in by_component.values())
    if quantized:
        if not default_is_complete:
            known = f"choose the weights to quantize with --variant ({', '.join(present)})"
            raise InvalidModelFolder(folder.root, "has no default weights in every component", known)
        return [None]
    return [*([None] if default_is_complete else []), *present]


def _plan_model(
    folder: SourceFolder,
    model_index: Mapping[str, Any],
    shards: list[Shard],
    variant: str | None,
    name: ModelName,
) -> ModelPlan:
    has_variant = {shard.component for shard in shards if shard.variant == variant}
    chosen = [shard for shard in shards if shard.variant == (variant if shard.component in has_variant else None)]
    chosen.sort(key=lambda shard: (_component_rank(shard.component), shard.file.path.name))
    lacking = {shard.component for shard in shards} - {shard.component for shard in chosen}
    if lacking:
        component = min(lacking)
        raise InvalidModelFolder(
            folder.root / component,
            f"has weights neither of the variant {variant!r} nor without one",
            "complete the download, or choose the weights to import with --variant",
        )
    files = tuple(
        file
        for file in folder.files
        if file.path.suffix != ".safetensors" and _index_belongs(file.path, variant, has_variant)
    )
    return ModelPlan(name, tuple(chosen), files, (), model_index)


def _index_belongs(path: PurePosixPath, variant: str | None, has_variant: set[str]) -> bool:
    """Whether a file that is no shard goes with the weights of `variant`: an index of others does not."""
    match = _WEIGHTS_INDEX.fullmatch(path.name)
    if match is None:
        return True
    return (match["early"] or match["late"]) == (variant if str(path.parent) in has_variant else None)


def _component_rank(component: str) -> tuple[int, str]:
    first = _FIRST_COMPONENTS
    return (first.index(component) if component in first else len(first), component)


def _all_files(model: ModelPlan) -> Iterable[SourceFile]:
    yield from (shard.file for shard in model.shards)
    yield from model.files


def _why_unused(variant: str | None, *, quantized: bool) -> str:
    if variant is not None:
        return f"not of the variant {variant}"
    if quantized:
        return "weights of a variant; a quantized import takes the default ones, or those of --variant"
    return "default weights of a component that has a variant, while another component has only the variant"
