"""The commands of `python -m jsoftmax`, one file each; only here is rich imported."""

import argparse
import importlib
from collections.abc import Sequence

_COMMANDS = {
    "verify": "check every closed form against many-digit arithmetic, on this machine's backend",
    "train": "train classifiers of scanned digits with every φ and every loss",
    "lm": "train a language model on the docstrings of installed packages, with every head for large vocabularies",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0, 1 for a miss, 2 for wrong usage or a missing extra."""
    parser = argparse.ArgumentParser(
        prog="python -m jsoftmax",
        description="jsoftmax: maps from scores to probabilities with closed-form derivatives.",
        epilog="; ".join(f"{name}: {description}" for name, description in _COMMANDS.items()),
    )
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the command's own; see COMMAND --help")
    given = parser.parse_args(arguments)
    try:
        command = importlib.import_module(f"jsoftmax.cli.{given.command}")
    except ModuleNotFoundError as missing:
        print(
            f"jsoftmax {given.command}: the package {missing.name!r} is missing. "
            f"Install the extra that has it: pip install 'jsoftmax[{given.command}]'."
        )
        return 2
    own = argparse.ArgumentParser(
        prog=f"python -m jsoftmax {given.command}", description=_COMMANDS[given.command].capitalize() + "."
    )
    command.add_arguments(own)
    return command.run(own.parse_args(given.options))
