"""`optimum-cli export leanvlm …`: Optimum finds this file in the namespace `optimum.commands.register`."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.manifest import POSITIONS, TARGETS


class LeanVLMExportCommand(BaseOptimumCLICommand):
    """The options of `leanvlm export`, in argparse; the work is the same function."""

    COMMAND = CommandInfo(name="leanvlm", help="Export a vision-language model with its token pruning inside the graph.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options, and the output also as Optimum's exporters take it; `ExportConfig` checks their values."""
        parser.add_argument("folder", nargs="?", type=Path, default=None, metavar="output", help="folder to write")
        parser.add_argument("--model", required=True, help="demo, an alias, a Hub id or a folder")
        parser.add_argument("--budget", default="64", help="image tokens kept per crop, such as 64 or 64,128; or a share: 25%%")
        parser.add_argument("--image-size", default=None, help="heights x widths that images may have: 448x448,448x616")
        parser.add_argument("--pruner", default="agile", help="name or name:field=value,…")
        parser.add_argument("--gate-file", type=Path, default=None, help="what `leanvlm calibrate gate` wrote for this model")
        parser.add_argument("--template", default=None, help="file with a chat template (jinja) to use; none exports without")
        parser.add_argument("--target", default="cpu", help=", ".join(TARGETS))
        parser.add_argument("--precision", default=None, help="fp32, fp16, int8 or int4; default: the target's")
        parser.add_argument("--vision-precision", default=None, help="of tower and projector, for cpu: fp32 (default) or int8")
        parser.add_argument("--positions", default=None, help=f"{' or '.join(POSITIONS)}: how kept tokens are numbered")
        parser.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
        parser.add_argument("--token", default=None, help="access token for the Hub")
        parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
        parser.add_argument("--force", action="store_true", help="replace an existing bundle")
        parser.add_argument("--dry-run", action="store_true", help="say what would be written, and how big")
        parser.add_argument("-o", "--output", type=Path, default=None, help="folder to write")

    def run(self) -> None:
        """Export as the options say; a wrong one ends with one line and exit status 2."""
        from leanvlm.export_command import export_command
        from leanvlm.runtime.console import one_line_errors

        options = {name: getattr(self.args, name) for name in inspect.signature(export_command).parameters}
        folder, output = self.args.folder, self.args.output
        with one_line_errors():
            if folder is not None and output is not None:
                raise InputError(f"the output is given twice, as {folder} and as --output {output}; give one")
            export_command(**{**options, "output": output or folder})


REGISTER_COMMANDS = [(LeanVLMExportCommand, ExportCommand)]
