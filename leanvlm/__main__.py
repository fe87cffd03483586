"""Where the command `leanvlm` starts: Ctrl-C and the like end it with one line from the first import on."""

from leanvlm.runtime.console import one_line_errors


def main() -> None:
    """Import the command line and run it."""
    with one_line_errors():
        from leanvlm.cli import main as command_line

        command_line()


if __name__ == "__main__":
    main()
