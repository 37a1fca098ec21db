"""`python -m benchmarks NAME` measures something; `--help` lists the names, and `--render` writes tables and
pictures."""

import argparse
import importlib
import pathlib


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Timings beside peers, in one process.")
    parser.add_argument(
        "name",
        nargs="?",
        choices=[
            *("family", "losses", "gumbel", "segments", "heads", "attention", "digits", "startup"),
            *("device", "programs", "lm", "xla"),
        ],
        help="what to measure",
    )
    parser.add_argument("--device", choices=["h100", "v5e"], default="h100", help="what programs are compiled for")
    parser.add_argument("--pod", help="programs of sharded heads for v5e:16x16, v5p:4x4x4 or h100:8")
    parser.add_argument("--only-heads", action="store_true", help="programs of heads; the rest of the JSON is kept")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON to write, in benchmarks/results by default")
    parser.add_argument(
        "--render", action="store_true", help="write tables and pictures of README and docs from the JSON files"
    )
    arguments = parser.parse_args()
    if not (arguments.name or arguments.render):
        parser.error("name what to measure, or --render")
    if arguments.name:
        benchmark = importlib.import_module(f"benchmarks.{arguments.name}")  # --render needs no JAX
        if arguments.name in (
            "family",
            "losses",
            "gumbel",
            "segments",
            "heads",
            "attention",
            "digits",
            "device",
            "startup",
        ):
            default = pathlib.Path(__file__).parent / "results" / f"{arguments.name}.json"
            benchmark.run(arguments.output or default)
        elif arguments.name == "programs" and arguments.pod:
            importlib.import_module("benchmarks.pod").run(arguments.pod, arguments.output)
        elif arguments.name == "programs":
            default = pathlib.Path(__file__).parent / "results" / f"programs-{arguments.device}.json"
            benchmark.run(arguments.device, arguments.output or default, arguments.only_heads)
        else:
            benchmark.run()
    if arguments.render:
        from benchmarks import render  # noqa: PLC0415  (it needs what only pages and pictures need)

        render.render()


if __name__ == "__main__":
    main()
