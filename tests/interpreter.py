"""Formulas of tests, evaluated by the reference interpreter of StableHLO.

Most tests compare formulas at a few scores. XLA takes 0.04 to 0.8 s to compile such a program. The interpreter, which
comes with jaxlib, evaluates it in some milliseconds, operation by operation: each result is rounded once to its dtype,
and numbers below the smallest normal one are kept. What XLA makes of a program is for the tests that compile it: by
`compilation.jit_as_user` as for users, by `verify.jit_formulas` without XLA's optimisations, as `verify` does.

With `COMPILE_FORMULAS=1` in the environment XLA compiles everything, as it does with jaxlib before 0.12: there XLA
takes a third of the time, and the interpreter is wrong where scatter writes to an operand that others read. Under
`jax.debug_nans` XLA compiles, too, since JAX looks for NaN in the results of compiled programs.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from compilation import BEFORE_0_12
from jax import dtypes
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo
from jaxprs import inner_jaxprs

BY_XLA = os.environ.get("COMPILE_FORMULAS") == "1" or BEFORE_0_12
NUMBERS = 500
"""XLA compiles one operation in about the time in which the interpreter computes so many numbers."""
ROUNDS = 16
"""How often a while loop is assumed to run; a scan states its length."""
NOT_EVALUATED = {
    f"stablehlo.{name}"
    for name in ("custom_call", "composite", "rng_bit_generator", "cholesky", "triangular_solve", "fft")
}
"""Calls of libraries, which the interpreter does not have."""
DIALECTS = {"stablehlo", "chlo", "func", "builtin"}
"""A program over several devices has operations of another one."""
TYPES = {
    "float32": ir.F32Type.get,
    "float64": ir.F64Type.get,
    "int32": lambda: ir.IntegerType.get_signless(32),
    "int64": lambda: ir.IntegerType.get_signless(64),
    "uint32": lambda: ir.IntegerType.get_unsigned(32),
    "uint64": lambda: ir.IntegerType.get_unsigned(64),
}
"""The dtypes in which arrays are handed over. Other dtypes are converted to a wider one of these."""
SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_matmul_precision",
)
"""JAX's settings under which one function may be traced to several programs."""

stablehlo.register_stablehlo_passes()


def evaluated(f):
    """f for arguments that are known: evaluated where the interpreter can, else compiled, once for each of their
    shapes and dtypes. Within a trace it is `jax.jit`. It has no static arguments and no `lower`."""
    compiled, programs = jax.jit(f), {}

    @functools.wraps(f)
    def of(*arguments, **options):
        leaves, structure = jax.tree.flatten((arguments, options))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        if traced or BY_XLA or jax.config.jax_debug_nans or any(map(_on_several_devices, leaves)):
            return compiled(*arguments, **options)
        kinds = tuple((np.shape(leaf), str(_dtype(leaf)), _is_number(leaf)) for leaf in leaves)
        key = structure, kinds, *(getattr(jax.config, name) for name in SETTINGS)
        if key not in programs:
            programs[key] = Program(f, leaves, structure)
        return programs[key](leaves)

    return of


class Program:
    """f for leaves of these shapes and dtypes."""

    def __init__(self, f, leaves, structure):
        def of_numpy(*given):
            arguments, options = structure.unflatten(map(_as, given, leaves))
            found = f(*arguments, **options)
            self.results = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), _dtype(a)), found)
            return jax.tree.map(_for_numpy, found)

        given = [_for_numpy(leaf) for leaf in leaves]
        traced = jax.jit(of_numpy, keep_unused=True).trace(*given)
        lowered = traced.lower()
        self.module = lowered.compiler_ir("stablehlo")
        some = all(np.size(a) for a in (*given, *jax.tree.leaves(self.results)))
        operations = _operations(self.module)
        faster = _size(getattr(traced.jaxpr, "jaxpr", traced.jaxpr)) < NUMBERS * len(operations)
        self.compiled = None if some and faster and all(map(_is_evaluated, operations)) else lowered.compile()
        if self.compiled is None:
            with self.module.context:  # to operations that the interpreter knows
                passes = passmanager.PassManager.parse("builtin.module(func.func(chlo-legalize-to-stablehlo))")
                passes.run(self.module.operation)

    def __call__(self, leaves):
        given, (results, structure) = [_for_numpy(leaf) for leaf in leaves], jax.tree.flatten(self.results)
        if self.compiled is None:
            with self.module.context:
                found = stablehlo.eval_module(self.module, [_attribute(a) for a in given])
                arrays = [np.array(a).reshape(a.type.shape) for a in found]
        else:
            arrays = jax.tree.leaves(self.compiled(*given))
        return structure.unflatten(_as(a, like) for a, like in zip(arrays, results, strict=True))


def _is_number(leaf):
    """Whether it is a number of Python, whose dtype is weak."""
    return type(leaf) in {int, float}


def _dtype(a):
    """As JAX takes it: of 32 bits unless 64 are enabled."""
    return dtypes.canonicalize_dtype(a.dtype if hasattr(a, "dtype") else np.result_type(a), allow_extended_dtype=True)


def _on_several_devices(leaf):
    return isinstance(leaf, jax.Array) and len(leaf.devices()) > 1


def _for_numpy(a):
    """The array, with a dtype of `TYPES`, and a number of Python as it is."""
    if _is_number(a):
        return a
    if dtypes.issubdtype(_dtype(a), dtypes.prng_key):
        a = jax.random.key_data(a)
    dtype = _dtype(a)
    if str(dtype) not in TYPES:
        dtype = jnp.dtype(np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int32)
    return jnp.asarray(a, dtype)


def _as(a, like):
    """The array as one of a leaf's own dtype."""
    if _is_number(like):
        return a
    dtype = _dtype(like)
    return jax.random.wrap_key_data(a) if dtypes.issubdtype(dtype, dtypes.prng_key) else jnp.asarray(a, dtype)


def _attribute(a):
    a = np.asarray(a, _dtype(a))
    return ir.DenseElementsAttr.get(np.ascontiguousarray(a), type=TYPES[str(a.dtype)](), shape=a.shape)


def _size(jaxpr):
    """How many numbers it computes."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        rounds = eqn.params["length"] if name == "scan" else ROUNDS if name == "while" else 1
        total += rounds * sum(map(_size, inner_jaxprs(eqn)))
        total += sum(math.prod(v.aval.shape) for v in eqn.outvars) * _work(eqn)
    return total


def _work(eqn):
    """The cost of one number of its result, in elementwise operations."""
    name, shape = eqn.primitive.name, eqn.invars[0].aval.shape if eqn.invars else ()
    if name == "dot_general":
        return math.prod(shape[i] for i in eqn.params["dimension_numbers"][0][0])
    if name in {"sort", "top_k"}:  # some 100 operations a number: the comparison is evaluated each time
        return 100 * math.prod(shape) / max(math.prod(eqn.outvars[0].aval.shape), 1)
    return 3 * shape[eqn.params["axis"]] if name.startswith("cum") else 1


def _operations(module):
    """All of them, with those of inner regions."""
    found = []
    module.operation.walk(lambda operation: found.append(operation) or ir.WalkResult.ADVANCE)
    return found


def _is_evaluated(operation):
    return operation.name not in NOT_EVALUATED and operation.name.split(".")[0] in DIALECTS
