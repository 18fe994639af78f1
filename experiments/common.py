"""What every command shares: configs on the command line, and how errors end it.

The only place where ConfigDicts become dataclasses. A config file has
`get_config(arg)`; every field is overridable as --config.group.field=value, and an
unknown one is refused with the nearest known name, wherever it was written.
"""

import argparse
import ctypes
import difflib
import dis
import importlib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from deepseek_jax.config import Config, flatten, from_dict, to_dict

PARENT = "DEEPSEEK_JAX_PARENT"  # in the environment: the process to end with
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BAD_INPUT, STOPPED, INTERRUPTED = 2, 1, 130  # exit codes

CONFIG_HELP = """\
FILE.py, or FILE.py:ARG for a switch of that file such as :smoke. \
--config.GROUP.FIELD=VALUE overrides a field, for example --config.train.steps=50, \
--config.balance.strategy=none, --config.model.moe.top_k=4, or, as pairs of step and \
value, --config.optim.mtp_weight_changes='((200, 0.1),)'. deepseek_jax/config.py lists \
every field with its meaning and default."""

GONE = """\
another process of this run has ended; its own output says why. The checkpoints are \
kept, and the same command goes on from the last one"""
TRACEBACK = "Show where an error came from."
flags.DEFINE_bool("traceback", False, TRACEBACK)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other bad input: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def to_config_dict(config: Config) -> ConfigDict:
    """A locked ConfigDict with every field; `from_config_dict` inverts it."""
    return ConfigDict(to_dict(config)).lock()


def from_config_dict(values: Mapping[str, Any]) -> Config:
    """The checked dataclasses of a ConfigDict or a nested mapping.

    Raises:
      ValueError: an unknown field (the nearest is named) or an impossible value.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    for name in flatten(values):
        check_field(name)
    return from_dict(Config, values)


def check_field(name: str) -> None:
    """Refuses a dotted name that is no field of a `Config`, naming the nearest.

    Raises:
      ValueError: as said.
    """
    known = flatten(to_dict(Config()))
    inside = next((field for field in known if field.startswith(f"{name}.")), None)
    if inside:
        raise ValueError(f"config key {name!r} is a group: set its fields, as {inside}")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown config key {name!r}{hint}")


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Defines --config=FILE.py[:ARG] for a command."""
    return config_flags.DEFINE_config_file("config", None, CONFIG_HELP)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses a command line, strictly.

    Raises:
      ValueError: an unknown flag or config field, or a value of another type.
    """
    if {"-h", "--help", "--helpshort"} & set(arguments[1:]):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    for argument in arguments[1:]:
        if found := re.match(r"--?config\.([\w.]+)", argument):
            check_field(found[1])
        file = re.match(r"--?config=([^:]+)", argument)
        if file and not Path(file[1]).is_file():
            raise ValueError(f"--config={file[1]}: there is no such file")
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        # An error in get_config comes as a whole stack trace; its last line says it.
        last = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        last = re.sub(r"invalid literal for int\(\) .*: ", "must be whole, not ", last)
        raise ValueError(last + _field_hint(last)) from error
    if rest[1:]:
        raise ValueError(f"unknown argument {rest[1]!r}: flags begin with --")
    return rest


def _field_hint(message: str) -> str:
    """What to write for a field that was taken for a flag, if that is the matter."""
    found = re.search(r"Unknown command line flag '(\w+)'", message)
    if not found:
        return ""
    ends = f".{found[1]}"
    near = [f"--config.{name}" for name in flatten(to_dict(Config()))]
    near = [name for name in near if name.endswith(ends)]
    return f"; the field is {' or '.join(near)}" if near else ""


def require(holder: flags.FlagHolder[Any], example: str) -> Any:
    """The value of a flag that must be given.

    Raises:
      ValueError: it was not.
    """
    if holder.value is None:
        raise ValueError(f"--{holder.name} is missing, for example {example}")
    return holder.value


def command(module: str) -> str:
    """How a command of ours is called from here, to be printed."""
    here, own = Path.cwd(), Path(sys.executable)
    python = str(own.relative_to(here)) if own.is_relative_to(here) else "python"
    return f"{python} -m {module}"


def arguments(module: str, about: str | None) -> Parser:
    """The parser of a command that takes no config, with --traceback."""
    parser = Parser(
        f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs a command; a foreseen error is one line on stderr and an exit code.

    2 is bad input, 1 a run that had to stop (a loss that is no number, a full disk),
    130 an interrupt. Anything else is a bug and keeps its stack trace, also a
    ValueError that no line of ours raised.
    """
    # Notes of ours are for people; which backends JAX did not find is not.
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    for noisy in ("xla_bridge", "distributed"):
        logging.getLogger(f"jax._src.{noisy}").setLevel(logging.WARNING)
    app.run(
        lambda _: guarded(main), flags_parser=lambda argv: guarded(parse_flags, argv)
    )


def guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`, or exits as `run` says."""
    try:
        return function(*arguments)
    except BrokenPipeError:  # who read the output, as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end(STOPPED)
    except (Exception, KeyboardInterrupt) as error:
        if (found := foreseen(error)) is None:
            if not among_others():
                raise
            traceback.print_exception(error)
            end(STOPPED)
        text, code = found
        if "--traceback" in sys.argv:
            traceback.print_exception(error)
    print(" ".join(text.split()), file=sys.stderr)
    end(code)


def foreseen(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error, and the exit code; None of one that is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", INTERRUPTED
    if among_others() and processes().is_loss(error):
        return f"error: {GONE}", STOPPED
    if isinstance(error, ValueError) and is_ours(error):
        return f"error: {error}", BAD_INPUT
    if isinstance(error, FloatingPointError | OSError):
        return f"error: {error}", STOPPED
    return None


def processes() -> ModuleType:
    """Where several processes agree; not imported by commands that need no JAX."""
    return importlib.import_module("deepseek_jax.parallel.processes")


def among_others() -> bool:
    """Whether this is one of several processes of a run."""
    return "jax" in sys.modules and processes().several()


def end(code: int) -> NoReturn:
    """Exits; without waiting for the other processes of a run, if there are any."""
    if among_others():
        processes().leave(code)
    sys.exit(code)


def end_with_parent() -> None:
    """Has Linux send SIGTERM, at which a run saves, when the sweep it is of dies.

    Without it a sweep that is killed would leave runs behind that hold their folders.
    """
    parent = os.environ.get(PARENT)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if parent and prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before
            os.kill(os.getpid(), signal.SIGTERM)


def is_ours(error: Exception) -> bool:
    """Whether a `raise` outside the installed packages made an error.

    Looking at the file alone would not do: JAX cuts its own frames out of a traceback,
    and code in C has none.
    """
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    installed = {"site-packages", "dist-packages"} & set(Path(code.co_filename).parts)
    standard = code.co_filename.startswith(os.path.dirname(os.__file__) + os.sep)
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and not installed and not standard
