"""Types are checked at run time in every test: jaxtyping's annotations by beartype."""

import gc
import os
import pathlib
import tempfile

# Workers, and the programs that tests start, share what one of them has compiled, for as long as the tests run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": PROGRAMS.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# One part is compiled faster than several, and to the same numbers. XLA reads this when it is loaded.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1".lstrip()

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes
jaxtyping.install_import_hook("jsoftmax", "beartype.beartype")

gc.set_threshold(200_000, 20, 100)  # traces make many objects and few cycles: by default, a collection every 700

MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """A compiled program takes some memory maps, and Linux gives a process 65530 of them: beyond that XLA crashes.
    Until there are many, the next module may use the programs of this one, since most single operations occur again."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
