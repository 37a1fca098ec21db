"""The commands of `python -m jsoftmax`, one file for each. rich is imported only in this package."""

import argparse
import importlib
import textwrap
from collections.abc import Sequence

_COMMANDS = {
    "verify": (
        "check every closed form against many-digit arithmetic, on this machine's backend",
        "verify --all --json errors.json",
    ),
    "train": (
        "train classifiers of scanned digits with every φ and every loss",
        "train --loss focal sparsemax --seeds 3",
    ),
    "lm": (
        "train a language model on the docstrings of installed packages, with every head for large vocabularies",
        "lm --head adaptive --quick",
    ),
}
"""What each command does, and an example."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. The exit code is 0, 1 for a miss, and 2 for wrong usage or a missing extra."""
    parser = argparse.ArgumentParser(
        prog="python -m jsoftmax",
        description="jsoftmax: maps from scores to probabilities with closed-form derivatives.",
        epilog=_listed(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=_COMMANDS, help="see below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the command's own; see COMMAND --help")
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    try:
        command = importlib.import_module(f"jsoftmax.cli.{given.command}")
    except ModuleNotFoundError as missing:
        print(
            f"jsoftmax {given.command}: the package {missing.name!r} is missing. "
            f"Install the extra that has it: pip install 'jsoftmax[{given.command}]'."
        )
        return 2
    about, example = _COMMANDS[given.command]
    own = argparse.ArgumentParser(
        prog=f"python -m jsoftmax {given.command}",
        description=about.capitalize() + ".",
        epilog=f"example: python -m jsoftmax {example}",
    )
    command.add_arguments(own)
    return command.run(own.parse_args(given.options))


def _listed() -> str:
    """The commands with what they do and an example, in 80 columns."""
    lines = ["commands:"]
    for name, (about, example) in _COMMANDS.items():
        lines += textwrap.wrap(f"{name:8}{about}", 78, initial_indent="  ", subsequent_indent=" " * 10)
        lines.append(f"{'':10}e.g. python -m jsoftmax {example}")
    return "\n".join(lines)
