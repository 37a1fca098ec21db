"""Types are checked at run time in every test: jaxtyping's annotations by beartype."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes
jaxtyping.install_import_hook("jsoftmax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Each compiled program takes several memory maps, and Linux gives a process 65530: past them XLA crashes."""
    yield
    jax.clear_caches()
