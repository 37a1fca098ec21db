"""`python -m benchmarks family [--output FILE] | xla | startup`, `python -m benchmarks --render`."""

import argparse
import importlib
import pathlib


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Timings beside peers, in one process.")
    parser.add_argument("name", nargs="?", choices=["family", "xla", "startup"], help="what to measure")
    default = pathlib.Path(__file__).parent / "results" / "family.json"
    parser.add_argument("--output", type=pathlib.Path, default=default, help="the JSON to write")
    parser.add_argument(
        "--render", action="store_true", help="write the README's table and picture from the JSON files"
    )
    arguments = parser.parse_args()
    if not (arguments.name or arguments.render):
        parser.error("name what to measure, or --render")
    if arguments.name == "family":
        from benchmarks import family  # noqa: PLC0415  (--render needs no JAX)

        family.run(arguments.output)
    elif arguments.name:
        importlib.import_module(f"benchmarks.{arguments.name}").run()
    if arguments.render:
        from benchmarks import render  # noqa: PLC0415

        render.render()


if __name__ == "__main__":
    main()
