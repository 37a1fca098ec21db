"""How tests compile programs for CPU.

A test spends most of its time in XLA. Most tests compare formulas, and compile without XLA's optimisations of machine
code, in a third of the time (`conftest.py`). What those may change is rounding: tests of digits, of scores that are
made in the same program, of over- and underflow compile by `jit_as_user`. From JAX 0.12 on, where XLA takes two to four
times as long, many formulas are not compiled at all (`interpreter.py`).

With `XLA_FLAGS=--xla_backend_optimization_level=3` in the environment everything is compiled as for users, except by
`verify.jit_formulas`; with `COMPILE_FORMULAS=1` nothing is evaluated without being compiled.

With `JAX_COMPILATION_CACHE_DIR=FOLDER` in the environment JAX keeps the compiled programs there, by what XLA is given
and by its options. The next run, of which most programs are the same, then takes two thirds of the time.
"""

import importlib.metadata
import os

LEVEL, EMITTERS = "xla_backend_optimization_level", "xla_cpu_use_fusion_emitters"
BEFORE_0_12 = importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11."))
"""jaxlib 0.12 has no EMITTERS option any more, and an interpreter that tests can use."""
AS_FOR_USERS = {LEVEL: 3} | ({EMITTERS: True} if BEFORE_0_12 else {})


def flags():
    """XLA's flags for the programs of tests. XLA reads them when it is loaded."""
    given = os.environ.get("XLA_FLAGS", "")
    plain = "" if LEVEL in given else f"--{LEVEL}=0" + (f" --{EMITTERS}=false" if BEFORE_0_12 else "")
    # one part is compiled faster than several, and to the same numbers
    return f"{given} --xla_cpu_parallel_codegen_split_count=1 {plain}".strip()


def jit_as_user(f):
    """jax.jit with XLA's defaults, as programs outside the tests are compiled."""
    import jax  # noqa: PLC0415  # after the flags

    return jax.jit(f, compiler_options=AS_FOR_USERS if jax.default_backend() == "cpu" else None)
