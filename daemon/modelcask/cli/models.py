"""Commands that look at what is stored: ls, show, path, diff, df."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from modelcask.cli.output import (
    existing_store,
    json_option,
    print_json,
    print_table,
    size_text,
    store_option,
)
from modelcask.errors import ModelcaskError, ModelNotFound, MountFailed, printable
from modelcask.facts import (
    ComponentFacts,
    Summary,
    TensorFacts,
    compare,
    components,
    image_model,
    summarize,
    tensors,
)


@click.command("ls")
@store_option
@json_option
def ls_command(root: Path, *, as_json: bool) -> None:
    """List the stored models.

    SIZE is what the model takes alone; see `modelcask df` for what sharing saves.
    """
    store = existing_store(root)
    summaries, unreadable = [], False
    for name in store.manifests.names():
        try:
            stored = store.manifests.read(name)
            if stored.manifest.is_image_model:
                summaries.append(summarize(store, stored))
        except ModelNotFound:
            continue  # removed meanwhile
        except ModelcaskError as error:
            click.echo(f"modelcask: {error}", err=True)
            unreadable = True
    if as_json:
        print_json([_summary_json(summary) for summary in summaries])
    elif summaries:
        rows = [
            (s.name, s.architecture, _count_text(s.parameter_count), s.quantization, size_text(s.size))
            for s in summaries
        ]
        print_table(("NAME", "ARCHITECTURE", "PARAMETERS", "QUANTIZATION", "SIZE"), rows, right=(2, 4))
    sys.exit(unreadable)


@click.command("show")
@click.argument("name")
@click.option("--tensors", "with_tensors", is_flag=True, help="List every tensor, too.")
@store_option
@json_option
def show_command(name: str, root: Path, *, with_tensors: bool, as_json: bool) -> None:
    """Show what the model NAME consists of, and what quantizing it cost.

    ERROR is the root mean square of what quantizing changed, relative to that of the weights. --json adds
    every layer with its digest.
    """
    store = existing_store(root)
    stored = image_model(store, name)
    summary = summarize(store, stored)
    parts = components(store, stored)
    if as_json:
        every = [_tensor_json(each) for found in tensors(store, stored).values() for each in found]
        layers = [layer.to_json() for layer in stored.manifest.layers]
        facts = {part.name: _component_json(part) for part in parts}
        print_json({**_summary_json(summary), "component_facts": facts, "tensors": every, "layers": layers})
        return
    click.echo(f"{printable(summary.name)}  {printable(summary.architecture)}")
    click.echo(f"manifest      {summary.manifest}")
    click.echo(f"parameters    {_count_text(summary.parameter_count)}")
    click.echo(f"quantization  {printable(summary.quantization) or 'none'}")
    click.echo(f"size          {size_text(summary.size)}")
    click.echo()
    _print_components(parts)
    if with_tensors:
        click.echo()
        rows = [
            (each.name, each.dtype, "×".join(map(str, each.shape)) or "scalar", each.kept or _error_text(each.error))
            for found in tensors(store, stored).values()
            for each in found
        ]
        print_table(("TENSOR", "DTYPE", "SHAPE", "ERROR, OR WHY IT IS KEPT"), rows)


@click.command("path")
@click.argument("name")
@click.option("--view", default="diffusers", show_default=True, help="The client convention to point at.")
@store_option
@json_option
def path_command(name: str, view: str, root: Path, *, as_json: bool) -> None:
    """Print where the model NAME is mounted.

    \b
      DiffusionPipeline.from_pretrained("$(modelcask path flux)")
    """
    from modelcask.hub_names import snapshot_path
    from modelcask.mounts import mounts_of

    store = existing_store(root)
    stored = image_model(store, name)
    mounts = mounts_of(store.root)
    if not mounts:
        raise MountFailed(store.root, "is not mounted anywhere", "run `modelcask mount DIR` or `modelcask up`")
    within = snapshot_path(stored) if view == "hub" else stored.name.view_path
    paths = [mount.mountpoint / view / within for mount in mounts]
    path = next((path for path in paths if path.is_dir()), None)
    if path is None:
        raise MountFailed(paths[0], f"the mount shows no {stored.name} under {view}", "try another --view")
    if as_json:
        print_json({"name": str(stored.name), "view": view, "path": str(path)})
    else:
        click.echo(str(path))


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@store_option
@json_option
def diff_command(first: str, second: str, root: Path, *, as_json: bool) -> None:
    """Compare the tensors of the models A and B.

    Equal tensors are stored once. For quantized models, each component's size and error stand side by side.
    """
    store = existing_store(root)
    one, two = (image_model(store, name) for name in (first, second))
    difference = compare(one, two)
    both = [(each, {part.name: part for part in components(store, each)}) for each in (one, two)]
    if as_json:
        facts = [{name: _component_json(part) for name, part in parts.items()} for _, parts in both]
        print_json({**asdict(difference), "component_facts": facts})
        return
    for mark, names in (("~", difference.changed), ("-", difference.only_first), ("+", difference.only_second)):
        for name in names:
            click.echo(f"{mark} {printable(name)}")
    if any(each.manifest.quantization for each, _ in both):
        click.echo()
        rows = []
        for component in dict.fromkeys(name for _, parts in both for name in parts):
            sides = [parts.get(component) for _, parts in both]
            texts = [(size_text(side.stored_bytes), _error_text(side.error)) if side else ("", "") for side in sides]
            rows.append((component, *texts[0], *texts[1]))
        print_table(("COMPONENT", f"SIZE OF {first}", "ERROR", f"SIZE OF {second}", "ERROR"), rows, right=(1, 2, 3, 4))
    click.echo(
        f"{len(difference.equal)} equal, {len(difference.changed)} changed (~), "
        f"{len(difference.only_first)} only in {first} (-), {len(difference.only_second)} only in {second} (+)"
    )


@click.command("df")
@store_option
@json_option
def df_command(root: Path, *, as_json: bool) -> None:
    """Show the space that models take, alone and shared.

    SHARED is stored once for several models; UNIQUE is what removing the model would free.
    """
    from modelcask.usage import measure

    usage = measure(existing_store(root))
    if as_json:
        models = [
            {
                "name": str(model.name),
                "bytes": model.size,
                "unique_bytes": model.unique_bytes,
                "shared_bytes": model.shared_bytes,
            }
            for model in usage.models
        ]
        print_json(
            {
                "logical_bytes": usage.logical_bytes,
                "stored_bytes": usage.stored_bytes,
                "reclaimable_bytes": usage.reclaimable_bytes,
                "models": models,
            }
        )
        return
    rows = [
        (str(m.name), size_text(m.size), size_text(m.unique_bytes), size_text(m.shared_bytes)) for m in usage.models
    ]
    if rows:
        print_table(("NAME", "SIZE", "UNIQUE", "SHARED"), rows, right=(1, 2, 3))
        click.echo()
    saved = usage.logical_bytes - (usage.stored_bytes - usage.reclaimable_bytes)
    click.echo(
        f"{size_text(usage.logical_bytes)} of models take {size_text(usage.stored_bytes)}: "
        f"{size_text(max(saved, 0))} saved by sharing, "
        f"{size_text(usage.reclaimable_bytes)} to be freed by `modelcask gc`"
    )


def _summary_json(summary: Summary) -> dict[str, Any]:
    return {
        "name": summary.name,
        "manifest": str(summary.manifest),
        "architecture": summary.architecture,
        "parameter_count": summary.parameter_count,
        "quantization": summary.quantization,
        "components": list(summary.components),
        "size": summary.size,
    }


def _component_json(part: ComponentFacts) -> dict[str, Any]:
    return {
        "tensors": part.tensors,
        "dtypes": part.dtypes,
        "bytes": part.source_bytes,
        "stored_bytes": part.stored_bytes,
        "quantized": part.quantized,
        "kept": part.kept,
        "error": part.error,
    }


def _tensor_json(each: TensorFacts) -> dict[str, Any]:
    return {"name": each.name, "dtype": each.dtype, "shape": list(each.shape), "error": each.error, "kept": each.kept}


def _print_components(parts: list[ComponentFacts]) -> None:
    rows = [
        (
            part.name,
            str(part.tensors),
            ", ".join(f"{count} {dtype}" for dtype, count in part.dtypes.items()),
            size_text(part.source_bytes),
            size_text(part.stored_bytes),
            str(part.quantized) if part.quantized else "",
            _error_text(part.error),
        )
        for part in parts
    ]
    header = ("COMPONENT", "TENSORS", "DTYPES", "SIZE", "STORED", "QUANTIZED", "ERROR")
    print_table(header, rows, right=(1, 3, 4, 5, 6))
    for part in parts:
        if part.kept:
            reasons = ", ".join(f"{count} ({reason})" for reason, count in part.kept.items())
            click.echo(f"kept as they came in {printable(part.name)}: {printable(reasons)}")


def _error_text(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def _count_text(count: int) -> str:
    """Parameters as model pages write them: `12.1 B`, `860 M`."""
    if count >= 10**9:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:.0f} M" if count >= 10**7 else f"{count:,}"
