"""Commands that bring models in: import, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modelcask import importer, plan, source
from modelcask.cli.output import (
    json_option,
    print_json,
    progress,
    size_text,
    store_option,
)
from modelcask.cli.signals import stopping_on_signals
from modelcask.errors import printable
from modelcask.facts import components
from modelcask.importer import ImportResult
from modelcask.quantize import QUANT_TYPES
from modelcask.store import Store

# How a tensor's reason for being kept begins if its dtype is one that weights are quantized to.
_QUANTIZED_DTYPES = ("dtype F8", "dtype F6", "dtype F4", "dtype U8", "dtype I8")


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--name", metavar="NAME", help="The model's name, [namespace/]name[:tag]; else the folder's.")
@click.option("--variant", metavar="V", help="Import only the weights of this variant, such as fp16.")
@click.option(
    "--quantize", metavar="T", type=click.Choice(list(QUANT_TYPES)), help="Quantize: " + ", ".join(QUANT_TYPES) + "."
)
@store_option
@json_option
def import_command(
    folder: Path,
    name: str | None,
    variant: str | None,
    quantize: str | None,
    root: Path,
    *,
    as_json: bool,
) -> None:
    """Store the diffusers model in the folder DIR.

    Tensors that are stored already, from whatever model, are not stored again. Weights with a variant
    (model.fp16.safetensors) become a tag of their own, NAME:fp16. What is left out is listed with the
    reason. Every byte is durable when the command returns, and the mounted model is byte for byte the
    folder: you can delete it.

    With --quantize, the large matrices of all components but the VAE are stored in 4 or 8 bits; `modelcask
    show` tells what that cost in precision. Keep the folder if you want the original weights back.

    \b
      modelcask import ~/Downloads/FLUX.1-schnell --name black-forest-labs/flux.1-schnell
    """
    planned = plan.plan_import(source.look(folder), name=name, variant=variant, quantize=quantize)
    store = Store.create(root)
    names = ", ".join(str(model.name) for model in planned.models)
    with stopping_on_signals() as stop, progress(f"importing {names}", quiet=as_json) as report:
        results = importer.run_import(store, planned, report=report, stop=stop)
    if as_json:
        print_json([result_json(result) for result in results])
    else:
        _print_results(results)
        if quantize is not None:
            _print_quantization(store, results[0])


@click.command("demo")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@store_option
def demo_command(folder: Path, root: Path) -> None:
    """Write a small, valid diffusers folder to DIR, to try things with.

    Its weights are random: it loads and runs, but it draws noise. Nothing is imported yet.
    """
    del root
    from modelcask.demo import write_demo

    write_demo(folder)
    click.echo(f"wrote a small model to {folder}; now try: modelcask import {folder}")


def result_json(result: ImportResult) -> dict[str, Any]:
    """One entry of `import --json`."""
    return {
        "name": str(result.name),
        "manifest": str(result.manifest),
        "tensors": result.tensors,
        "layers": result.layers,
        "source_bytes": result.source_bytes,
        "new_blobs": result.new_blobs,
        "new_bytes": result.new_bytes,
        "reused_blobs": result.reused_blobs,
        "reused_bytes": result.reused_bytes,
        "skipped": [{"path": entry.path, "reason": entry.reason} for entry in result.skipped],
        "seconds": round(result.seconds, 3),
    }


def _print_quantization(store: Store, result: ImportResult) -> None:
    """What was quantized, what it cost, and what came quantized already."""
    parts = components(store, store.manifests.read(result.name))
    for part in parts:
        if part.error is not None:
            click.echo(f"  quantized {part.quantized} of {part.tensors} tensors in {part.name}, error {part.error:.2%}")
    kept = [(count, reason) for part in parts for reason, count in part.kept.items()]
    came_quantized = sum(count for count, reason in kept if reason.startswith(_QUANTIZED_DTYPES))
    if came_quantized:
        click.echo(f"  {came_quantized} tensors came in 8 bits or fewer and stay as they came")
    click.echo(f"  `modelcask show {result.name}` tells what was left as it came, and why")


def _print_results(results: list[ImportResult]) -> None:
    for result in results:
        new, reused = size_text(result.new_bytes), size_text(result.reused_bytes)
        click.echo(
            f"{result.name}  {result.tensors} tensors, {size_text(result.source_bytes)}: "
            f"{new} new, {reused} already stored, {result.seconds:.1f} s"
        )
    for entry in results[0].skipped:
        click.echo(f"  left out {printable(entry.path)}: {entry.reason}")
