"""Two programs side by side: the exchanges of each under the products of the other.

What figure 4 of arXiv:2412.19437 does with the parts of a forward and a backward chunk,
for any two functions: both are cut at what they exchange between devices, and their
pieces take turns. An exchange starts only when the other program's has arrived, and
that goes on only then, so that each is under way while the other computes. Nothing else
changes: the pieces are the functions' own operations in their own order.
"""

import functools
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

CALLS = {  # what only wraps operations, and where it has them
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
}
EXCHANGES = {"all_to_all", "ragged_all_to_all", "all_gather", "reduce_scatter"}
LEAST = 1 / 4  # of the largest exchange's bytes; smaller ones cut nothing

UNNAMED = core.DebugInfo("pipeline", "a piece of a program", None, None)
Walk = Generator[tuple[Callable[..., Any], Any], Any, Any]


class Program(NamedTuple):
    """A function as a list of operations, none of them a wrapper or of no use."""

    given: list[Any]  # variables
    constants: dict[Any, Any]
    equations: list[Any]
    results: list[Any]


def side_by_side(
    first: Callable[..., Any],
    second: Callable[..., Any],
    first_given: tuple[Any, ...],
    second_given: tuple[Any, ...],
) -> tuple[Any, Any]:
    """(first(*first_given), second(*second_given)), with exchanges as the module says.

    The first one's first exchange is what starts.
    """
    programs, structures, values = [], [], []
    for function, given in ((first, first_given), (second, second_given)):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*given)
        programs.append(flat(closed))
        structures.append(jax.tree.structure(shape))
        values.append(jax.tree.leaves(given))
    largest = max(size(each) for p in programs for each in p.equations)
    walks = [
        walk(program, given, max(1, LEAST * largest))
        for program, given in zip(programs, values, strict=True)
    ]
    results = zip(structures, take_turns(walks), strict=True)
    one, other = (jax.tree.unflatten(*each) for each in results)
    return one, other


def take_turns(walks: list[Walk]) -> list[Any]:
    """Runs two walks from exchange to exchange, and returns what they return."""
    results: list[Any] = [None, None]
    who, sent, flying = 0, None, None
    left = {0, 1}
    while left:
        try:
            exchange, operands = walks[who].send(sent)
        except StopIteration as stop:
            results[who] = stop.value
            left.discard(who)
            who, sent, flying = 1 - who, flying, None
            continue
        if len(left) == 1:
            sent = exchange(operands)
            continue
        arrived = None
        if flying is not None:
            operands, arrived = lax.optimization_barrier((operands, flying))
        flying = exchange(operands)
        who, sent = 1 - who, arrived
    return results


def walk(program: Program, values: list[Any], least: float) -> Walk:
    """Evaluates a program; yields its exchanges, to be sent what comes of them."""
    env = program.constants | dict(zip(program.given, values, strict=True))
    equations, start = program.equations, 0
    for n, equation in enumerate(equations):
        if size(equation) >= least:
            later = equations[n:], program.results
            evaluate(equations[start:n], env, later)
            given = [read(env, var) for var in equation.invars]
            came = yield functools.partial(apply, equation), given
            env.update(zip(equation.outvars, came, strict=True))
            start = n + 1
    evaluate(equations[start:], env, ([], program.results))
    return [read(env, var) for var in program.results]


def size(equation: Any) -> int:
    """Bytes that come, if it is an exchange; else 0."""
    if equation.primitive.name not in EXCHANGES:
        return 0
    return sum(var.aval.size * var.aval.dtype.itemsize for var in equation.outvars)


def read(env: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else env[var]


def variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def evaluate(
    equations: list[Any], env: dict[Any, Any], later: tuple[list[Any], list[Any]]
) -> None:
    """Adds to `env` what some operations compute and later ones or results read."""
    made = {var for equation in equations for var in equation.outvars}
    wanted = variables(later[1])
    for equation in later[0]:
        wanted += variables(equation.invars)
    results = [var for var in dict.fromkeys(wanted) if var in made]
    if not results:
        return
    inputs = [var for equation in equations for var in variables(equation.invars)]
    given = [var for var in dict.fromkeys(inputs) if var not in made]
    piece = core.Jaxpr([], given, results, equations, debug_info=UNNAMED)
    values = core.jaxpr_as_fun(piece)(*(env[var] for var in given))
    env.update(zip(results, values, strict=True))


def apply(equation: Any, values: list[Any]) -> Any:
    """Evaluates one operation."""
    fresh = [core.Var(var.aval) for var in equation.invars]
    alone = equation.replace(invars=fresh)
    piece = core.Jaxpr([], fresh, equation.outvars, [alone], debug_info=UNNAMED)
    return core.jaxpr_as_fun(piece)(*values)


def flat(jaxpr: Any) -> Program:
    """Unwraps what only wraps, and leaves out what no result depends on."""
    constants: dict[Any, Any] = {}
    equations: list[Any] = []

    def unwrap(inner: Any, atoms: list[Any], stack: Any) -> list[Any]:
        """Adds an inner list's operations on these atoms; its results."""
        names = dict(zip(inner.invars, atoms, strict=True))
        for var, value in zip(inner.constvars, inner.consts, strict=True):
            names[var] = core.Var(var.aval)
            constants[names[var]] = value

        def renamed(atom: Any) -> Any:
            return atom if isinstance(atom, core.Literal) else names[atom]

        for equation in inner.eqns:
            source = equation.source_info
            if stack is not None:
                source = source.replace(name_stack=stack + source.name_stack)
            given = [renamed(atom) for atom in equation.invars]
            if equation.primitive.name in CALLS:
                wrapped = equation.params[CALLS[equation.primitive.name]]
                results = unwrap(wrapped, given, source.name_stack)
            else:
                results = [core.Var(var.aval) for var in equation.outvars]
                equations.append(
                    equation.replace(invars=given, outvars=results, source_info=source)
                )
            names.update(zip(equation.outvars, results, strict=True))
        return [renamed(atom) for atom in inner.outvars]

    given = [core.Var(var.aval) for var in jaxpr.invars]
    results = unwrap(jaxpr, given, None)
    needed, kept = set(variables(results)), []
    for equation in reversed(equations):
        if needed.intersection(equation.outvars):
            needed.update(variables(equation.invars))
            kept.append(equation)
    return Program(given, constants, kept[::-1], results)
