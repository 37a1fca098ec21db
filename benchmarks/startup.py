"""What `import jsoftmax` adds to `import jax`: the median over fresh processes."""

import statistics
import subprocess
import sys

CODE = "import time, jax; t = time.perf_counter(); import jsoftmax; print(1e3 * (time.perf_counter() - t))"


def run() -> None:
    def once() -> float:
        return float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)

    times = [once() for _ in range(12)][2:]  # the first ones compile the byte code
    print(f"import jsoftmax after import jax: {statistics.median(times):.0f} ms [{min(times):.0f}, {max(times):.0f}]")
