"""The command `modelcask`: finds the command asked for, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from modelcask import __version__
from modelcask.errors import ModelcaskError, disk_error, memory_error, printable

# Commands by the module that holds them. Only the one that runs is imported: `modelcask ls` starts in a
# quarter of a second because nothing else is loaded (tests/bench/bench_cold_start.py).
_MODULES = {
    "import": "transfer",
    "demo": "transfer",
    "ls": "models",
    "show": "models",
    "path": "models",
    "diff": "models",
    "df": "models",
    "rm": "upkeep",
    "gc": "upkeep",
    "verify": "upkeep",
    "mount": "serving",
    "umount": "serving",
    "watch": "serving",
    "up": "serving",
    "status": "status",
    "config": "configuration",
    "install-service": "installing",
    "uninstall-service": "installing",
}


class _Commands(click.Group):
    """The commands, in the order in which a new user meets them."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        module = importlib.import_module(f"modelcask.cli.{_MODULES[name]}")
        command: click.Command = getattr(module, f"{name.replace('-', '_')}_command")
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Keep diffusers models in a deduplicated store, and mount them as ordinary folders.

    \b
    Try it:
      modelcask demo ~/tiny              write a small model folder
      modelcask import ~/tiny            store it; equal tensors are stored once
      modelcask ls                       what is stored
      mkdir ~/models; modelcask mount ~/models
      ls ~/models/diffusers/library/tiny/latest

    `modelcask up` does it all in one: it imports what is dropped into ~/imports and shows it in ~/models.

    The store is ~/.local/share/modelcask; --store or MODELCASK_STORE names another. Exit codes: 0 done,
    1 failed, 2 wrong usage. Every command takes --debug, which shows where an error comes from.
    """


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        sys.exit(cli(prog_name="modelcask", standalone_mode=False))
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "modelcask"
        click.echo(f"modelcask: {printable(error.format_message())} See `{command} --help`.", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"modelcask: {printable(error.format_message())}", err=True)
        sys.exit(error.exit_code)
    except (ModelcaskError, OSError) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError):
            # The reader of our output went away; what Python flushes at exit must not complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        click.echo(f"modelcask: {_one_line(error)}", err=True)
        sys.exit(1)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("modelcask: interrupted", err=True)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - a bug; the user gets a line, --debug the traceback
        if debug:
            traceback.print_exc()
        what = printable(f"{type(error).__name__}: {error}")
        bug = f"this is a bug: {what}; run it again with --debug and report what it prints"
        click.echo(f"modelcask: {memory_error(error) or bug}", err=True)
        sys.exit(1)


def _one_line(error: ModelcaskError | OSError) -> str:
    if isinstance(error, ModelcaskError):
        return str(error)
    return disk_error(error)
