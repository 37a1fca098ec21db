"""`python -m benchmarks family [--output FILE]`."""

import argparse
import pathlib

from benchmarks import family


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Timings beside peers, in one process.")
    parser.add_argument("name", choices=["family"])
    default = pathlib.Path(__file__).parent / "results" / "family.json"
    parser.add_argument("--output", type=pathlib.Path, default=default, help="the JSON to write")
    arguments = parser.parse_args()
    family.run(arguments.output)


if __name__ == "__main__":
    main()
