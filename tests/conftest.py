"""Types are checked at run time, jaxtyping's annotations by beartype: with JAX before 0.12, where the gate runs every
cell. With newer ones tests take longest already."""

import gc
import os
import pathlib

import compilation

os.environ["XLA_FLAGS"] = compilation.flags()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each worker has a core; of more threads some would only wait
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # where a folder is given

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes
if compilation.BEFORE_0_12:
    jaxtyping.install_import_hook("jsoftmax", "beartype.beartype")

gc.set_threshold(500_000, 20, 100)  # traces make many objects and few cycles: by default, a collection every 700


def pytest_configure(config):
    """Of a folder of programs: a worker may find one that another has not written to its end. It compiles it then."""
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


def pytest_collection_finish():
    """What imports and the list of tests have made lives until the end: collections pass it by."""
    gc.freeze()


def pytest_sessionfinish():
    """The same at the end: pytest would collect five times what its process gives back as a whole a moment later."""
    gc.freeze()


@pytest.fixture
def rng():
    """A generator of random numbers for one test. A generator of a whole module would give other numbers if other tests
    ran before, as they do on several workers."""
    return np.random.default_rng(0)


MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """A compiled program takes some memory maps, and with its traces about a megabyte. Linux gives a process 65530 of
    the maps: beyond that XLA crashes. Until there are so many that they hold about two gigabytes, the next module may
    use the programs of this one, since most single operations occur again."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > 5_000:
        jax.clear_caches()
