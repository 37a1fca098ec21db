"""Types are checked at run time in every test: jaxtyping's annotations by beartype."""

import pathlib

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes
jaxtyping.install_import_hook("jsoftmax", "beartype.beartype")

MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Each compiled program takes some memory maps, and Linux gives a process 65530: past them XLA crashes. Until there
    are many, programs stay for the next module: most of those of single operations are asked for again."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
