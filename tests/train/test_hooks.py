"""Progress, signals, finiteness and the lock."""

import io
import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest

from deepseek_jax.train import hooks
from deepseek_jax.train.hooks import Interrupt, Progress, check_finite, check_params

VALUES = {"loss": 4.5, "ce": 4.25, "maxvio_batch": 0.625, "tokens_per_s": 8512.3}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_than_on_a_terminal_lines_are_plain_and_few():
    stream = io.StringIO()
    progress = Progress(300, stream, every=60)
    for step in range(1, 301):
        progress.update(step, VALUES, step_s=30.0 if step == 1 else 0.5)
        progress.shown -= 60 if step == 100 else 0
    progress.wait("evaluating")
    progress.say("note")
    progress.close()
    rest = "  loss 4.5000  ce 4.2500  maxvio 0.62  8,512 tokens/s"
    assert stream.getvalue().splitlines() == [
        f"step 1/300{rest}",  # compiling says nothing about the time left
        f"step 101/300{rest}  ETA 1:40",
        f"step 300/300{rest}  ETA 0:00",
        "evaluating",
        "note",
    ]


def test_on_a_terminal_there_is_one_live_line_and_notes_stay_above_it():
    stream = Terminal()
    progress = Progress(2, stream)
    progress.update(1, VALUES, step_s=1)
    progress.say("note")
    progress.update(2, VALUES, step_s=1)
    progress.wait("evaluating")
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.endswith("\n")
    assert text.index("step 1/2") < text.index("\rnote") < text.index("\rstep 2/2")
    assert text.index("\rstep 2/2") < text.index("\revaluating ...")


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0:00"), (75, "1:15"), (3675, "1:01:15")]
)
def test_clock(seconds, text):
    assert hooks.clock(seconds) == text


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_is_named(name, value):
    values = {"loss": 1.0, "grad_norm": 1.0}
    check_finite(17, values)
    with pytest.raises(FloatingPointError, match=f"{name} is {value} at step 17"):
        check_finite(17, values | {name: jnp.asarray(value)})


def test_parameters_that_are_not_finite_are_refused():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}
    check_params(5, params)
    params["b"]["c"] = params["b"]["c"].at[1, 0].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="after step 5"):
        check_params(5, params)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    said = []

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, handler)
    try:
        with Interrupt(said.append) as interrupt:
            assert interrupt.received is None
            os.kill(os.getpid(), number)
            assert interrupt.received == number
            assert number.name in said[0] and len(said) == 1
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_among_several_the_vote_decides_and_only_the_first_talks(monkeypatch):
    monkeypatch.setattr(hooks.processes, "several", lambda: True)
    monkeypatch.setattr(hooks.processes, "is_first", lambda: False)
    interrupt = Interrupt()
    assert not interrupt.stopping()
    interrupt.received = signal.SIGINT
    assert not interrupt.stopping()  # the others cannot know yet
    interrupt.received = None
    assert interrupt.stopping()
    stream = io.StringIO()
    progress = Progress(3, stream)
    progress.update(1, VALUES, step_s=1)
    progress.say("note")
    assert not stream.getvalue()


def test_off_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def inside():
        with Interrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_process_a_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from deepseek_jax.train import hooks\n"
        "try:\n"
        "    with hooks.exclusive(Path(sys.argv[1])): print('free')\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with hooks.exclusive(tmp_path):
        taken = subprocess.run(command, capture_output=True, text=True, check=True)
    free = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path} is in use" in taken.stdout
    assert free.stdout == "free\n"


def test_asking_whether_a_folder_is_free_changes_nothing(tmp_path):
    hooks.check_free(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    with (
        hooks.exclusive(tmp_path),
        pytest.raises(hooks.InUse, match=f"{tmp_path} is in use"),
    ):
        hooks.check_free(tmp_path)
    before = (tmp_path / hooks.LOCK).stat().st_mtime_ns
    hooks.check_free(tmp_path)
    assert (tmp_path / hooks.LOCK).stat().st_mtime_ns == before
