"""What a measurement says of the machine; the benchmarks ask it, too."""

import pathlib
import platform


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
