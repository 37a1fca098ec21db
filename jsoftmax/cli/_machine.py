"""The name of the machine, for tables of measurements; the benchmarks use it, too."""

import pathlib
import platform


def processor() -> str:
    """The processor's name, or its architecture if the system does not tell the name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
