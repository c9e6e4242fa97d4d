"""Commands that remove and check: rm, gc, verify."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from modelcask.cli.output import (
    existing_store,
    json_option,
    print_json,
    progress,
    size_text,
    store_option,
)
from modelcask.cli.signals import stopping_on_signals
from modelcask.errors import printable
from modelcask.facts import image_model
from modelcask.names import ModelName
from modelcask.store import Store


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@store_option
@json_option
def rm_command(names: tuple[str, ...], root: Path, *, as_json: bool) -> None:
    """Remove models.

    Frees nothing yet: other models may share their tensors. `modelcask gc` then removes what none needs.
    """
    store = Store.open(root)
    stored = list({model.name: model for name in names if (model := image_model(store, name))}.values())
    for model in stored:
        store.manifests.remove(model.name)
    if as_json:
        print_json({"removed": [str(model.name) for model in stored]})
    else:
        for model in stored:
            click.echo(f"removed {model.name}; `modelcask gc` frees what no other model needs")


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@store_option
@json_option
def gc_command(root: Path, *, dry_run: bool, as_json: bool) -> None:
    """Remove the blobs that no model needs.

    What is being imported or is open in a mount stays.
    """
    from modelcask.gc import collect, find_garbage

    store = existing_store(root)
    garbage = find_garbage(store) if dry_run or not store.root.exists() else collect(store)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "removed": [str(digest) for digest in garbage.blobs],
                "removed_blobs": len(garbage.blobs),
                "freed_bytes": garbage.size,
            }
        )
    else:
        verb = "would remove" if dry_run else "removed"
        click.echo(f"{verb} {len(garbage.blobs)} blobs, {size_text(garbage.size)}")


@click.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--quick", is_flag=True, help="Compare fingerprints (xxh3), as fast as the disk.")
@store_option
@json_option
def verify_command(names: tuple[str, ...], root: Path, *, quick: bool, as_json: bool) -> None:
    """Read blobs again and compare them with their digests.

    Checks the models NAME, or the whole store. A corrupt blob is put into quarantine; importing a model
    that needs it again heals it. Exit code 1 if anything is wrong.
    """
    from modelcask.verify import Damage, verify

    store = existing_store(root)
    parsed = [ModelName.parse(name) for name in names]
    with stopping_on_signals() as stop, progress("verifying", quiet=as_json) as report:
        found = verify(store, parsed, quick=quick, report=report, stop=stop)
        interrupted = stop.is_set()

    def damage_json(damage: Damage) -> dict[str, Any]:
        return {"digest": str(damage.digest), "path": str(damage.path), "used_by": list(damage.used_by)}

    if as_json:
        print_json(
            {
                "checked": found.checked,
                "bytes": found.read_bytes,
                "corrupt": [damage_json(damage) for damage in found.corrupt],
                "missing": [damage_json(damage) for damage in found.missing],
                "unreadable": [{"path": str(error.path), "reason": error.reason} for error in found.unreadable],
            }
        )
    else:
        for kind, damages in (("corrupt", found.corrupt), ("missing", found.missing)):
            for damage in damages:
                users = ", ".join(damage.used_by) or "no model"
                click.echo(f"{kind} {damage.digest} (needed by {users}): {printable(str(damage.path))}")
        for error in found.unreadable:
            click.echo(f"unreadable manifest {error}")
        wrong = len(found.corrupt) + len(found.missing) + len(found.unreadable)
        click.echo(
            f"{found.checked} blobs checked, {size_text(found.read_bytes)} read: "
            + (f"{wrong} wrong" if wrong else "all sound")
        )
    if interrupted:
        click.echo("modelcask: interrupted, the rest was not checked", err=True)
    sys.exit(0 if found.is_sound and not interrupted else 1)
