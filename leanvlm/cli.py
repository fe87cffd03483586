"""The command `leanvlm`: its own options, and its commands by name, each imported when it is called or described."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer

import leanvlm
from leanvlm.runtime.console import INTERRUPTED, help_without_command
from leanvlm.runtime.errors import InputError

# As the help lists them: in the order in which they are used. Their modules import what is heavy when a command runs.
COMMANDS = {
    "export": "leanvlm.export_command:export_command",
    "run": "leanvlm.runtime.commands.cli:run",
    "serve": "leanvlm.runtime.commands.serve:serve",
    "batch": "leanvlm.runtime.commands.batch:batch_command",
    "profile": "leanvlm.runtime.commands.cli:profile",
    "inspect": "leanvlm.runtime.commands.cli:inspect",
    "build": "leanvlm.runtime.commands.build:build_command",
    "calibrate": "leanvlm.calibration.cli:calibrate",
    "eval": "leanvlm.calibration.cli:eval_command",
    "doctor": "leanvlm.runtime.commands.cli:doctor",
}

app = typer.Typer(
    name="leanvlm",
    help="Export a vision-language model with its visual-token pruning inside the graph, and run it without PyTorch.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(leanvlm.__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    wanted: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
    help_without_command(context)


class Commands(Mapping[str, Any]):
    """Commands by name; what is asked for is imported and made then."""

    def __getitem__(self, name: str) -> Any:
        return _made(name, COMMANDS[name])

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@cache
def _made(name: str, path: str) -> Any:
    """Import a command, a function or a group of its own, and make it what the parser calls."""
    module, attribute = path.split(":")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False, rich_markup_mode=None)
        found.command(name)(function)
    return typer.main.get_command(found)


@cache
def _command() -> Any:
    """Return the whole command."""
    command: Any = typer.main.get_command(app)
    command.commands = Commands()
    return command


def main() -> None:
    """Run the command line and end the process; raises what `one_line_errors` turns into a line and a status."""
    try:
        status = _command().main(prog_name="leanvlm", standalone_mode=False)
    except Exception as error:
        _raise_usage_error(error)
        raise
    if status == INTERRUPTED:  # So newer versions of typer report Ctrl-C; older ones abort.
        raise KeyboardInterrupt
    # Here, a reader that is gone is still an error that is caught.
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


def _raise_usage_error(error: Any) -> None:
    """Turn the parser's own errors, whichever click raised them, into ours."""
    if type(error).__name__ == "Abort":
        raise KeyboardInterrupt from error
    if hasattr(error, "format_message"):
        raise InputError(error.format_message() or "no command given; see leanvlm --help") from error
