"""Two processes share the classes: results are those of one; if a process is lost, the other ends and does not wait."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import processes
import pytest
from processes import CLASSES, HEARTBEAT, SHUTDOWN

from jsoftmax import heads

pytestmark = pytest.mark.full  # Each test starts two processes.

SLACK = 60
"""Seconds for a busy machine."""


@pytest.fixture
def start(tmp_path):
    """Starts both processes, with two devices each; none of them outlives the test."""
    started = []

    def run(task):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
        script = pathlib.Path(__file__).with_name("processes.py")
        for process in range(2):
            command = [sys.executable, script, str(port), str(process), "2", task, tmp_path]
            with (tmp_path / f"{process}.txt").open("w") as output:
                started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        return started

    yield run
    for process in started:
        process.kill()
        process.wait()


def text(folder):
    return [path.read_text() for path in sorted(folder.glob("*.txt"))]


def test_two_processes_equal_one(start, tmp_path):
    """Within 1e-14 of the largest number of each result: the order of sums over devices is another."""
    for process in start("compare"):
        assert process.wait(SLACK) == 0, text(tmp_path)
    with jax.enable_x64(True):
        given, labels = processes.arrays()

        def loss(hidden, weight, bias):
            return heads.linear_cross_entropy(hidden, weight, labels, bias, block_size=CLASSES // 4)

        want = jax.tree.leaves(jax.jit(processes.loss_and_derivatives(loss))(*given))
    for process in range(2):
        found = np.load(tmp_path / f"{process}.npz").values()
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-14 * np.max(np.abs(b)))


@pytest.mark.parametrize(("lost", "blow"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_lost_process_ends_the_other(start, tmp_path, lost, blow):
    """It ends with an error, after the heartbeat and shutdown timeouts at the latest. Process 0 is the coordinator."""
    both = start("endless")
    last = time.monotonic() + SLACK
    while len(list(tmp_path.glob("?.npz"))) < 2:
        assert time.monotonic() < last, text(tmp_path)
        assert [process.poll() for process in both] == [None, None], text(tmp_path)
        time.sleep(0.05)
    both[lost].send_signal(blow)
    assert both[1 - lost].wait(HEARTBEAT + SHUTDOWN + SLACK) != 0
