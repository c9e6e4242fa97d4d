"""The command that shows the configuration: config."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from modelcask import config
from modelcask.cli.output import json_option, print_json, print_table
from modelcask.cli.serving import config_option, optional_store_option
from modelcask.errors import printable


@click.command("config")
@config_option
@optional_store_option
@json_option
@click.pass_context
def config_command(context: click.Context, config_path: Path | None, root: Path | None, *, as_json: bool) -> None:
    """Show the effective configuration, and where each value comes from.

    Exit code 1 where something in it is not allowed; the line is told.
    """
    file = config_path or config.default_path()
    found = config.settings(config_path, store=root)

    def given_by(parameter: str, option: str, variable: str) -> str:
        by_variable = context.get_parameter_source(parameter) is ParameterSource.ENVIRONMENT
        return variable if by_variable else option

    def origin(setting: config.Setting) -> str:
        if setting.key == "store" and root is not None:
            return given_by("root", "--store", "MODELCASK_STORE")
        return f"{file}:{setting.line}" if setting.line else "default"

    if as_json:
        settings = [{"key": each.key, "value": each.value, "from": origin(each)} for each in found]
        print_json({"file": str(file), "exists": file.exists(), "settings": settings})
        return
    how = f"given by {given_by('config_path', '--config', 'MODELCASK_CONFIG')}" if config_path else "the usual place"
    click.echo(f"{printable(str(file))} ({how}{'' if file.exists() else '; not there'})\n")
    print_table(("KEY", "VALUE", "FROM"), [(each.key, _shown(each.value), origin(each)) for each in found])


def _shown(value: str | float | bool | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
