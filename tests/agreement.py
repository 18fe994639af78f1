"""How a fast path is held to its oracle: values, gradients, what its program does."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


@functools.lru_cache
def with_gradients(function: Callable) -> Callable:
    """Compiles (floats, others, cotangent) -> [value, gradient of each of the floats].

    `function` takes the floats, then the others; the cotangent is the value's.
    """

    @jax.jit
    def run(floats, others, cotangent):
        value, pull = jax.vjp(lambda *floats: function(*floats, *others), *floats)
        return [value, *pull(cotangent.astype(value.dtype))]

    return run


def assert_agree(actual, expected, bound: float) -> None:
    """Each array's largest error is at most `bound` times its largest entry."""
    assert len(actual) == len(expected)
    for number, (got, want) in enumerate(zip(actual, expected)):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        error = np.abs(got - want).max(initial=0)
        assert error <= bound * np.abs(want).max(initial=0), f"array {number}: {error}"


def as_dtype(arrays, dtype) -> list[jax.Array]:
    return [jnp.asarray(x, dtype) for x in arrays]


def operations(function: Callable, *args) -> list[core.JaxprEqn]:
    """Every equation of the function's program, those of inner programs included."""

    def walk(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.tree.leaves(list(equation.params.values())):
                if isinstance(inner, core.ClosedJaxpr):
                    inner = inner.jaxpr
                if isinstance(inner, core.Jaxpr):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


def largest(function: Callable, *args) -> int:
    """Elements of the largest array that the program computes."""
    results = [out for each in operations(function, *args) for out in each.outvars]
    return max(out.aval.size for out in results)


def matmul_dtypes(function: Callable, *args) -> list[tuple[str, str, str]]:
    """The dtypes of both operands and of the result, for each of its matmuls."""
    return [
        tuple(str(x.aval.dtype) for x in (*each.invars, *each.outvars))
        for each in operations(function, *args)
        if each.primitive.name == "dot_general"
    ]
