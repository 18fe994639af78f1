"""Trains one run as several processes of this machine, which JAX joins.

  python -m experiments.launch.processes --processes=4 -- \
      --config=experiments/configs/tiny.py --workdir=runs/tiny --config.mesh.data=4

What stands after -- goes to `python -m experiments.train` in each, whose --help says
what several processes need and do. The first one's output comes here and each one's
goes to the end of WORKDIR/log.<i>.txt. When a process ends with an error or is killed,
the others are stopped and the exit code is the error's; the last checkpoint stays
good, and the same command goes on from it. Ctrl-C saves and exits with 130.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deepseek_jax.analysis import runs
from deepseek_jax.parallel.cluster import ADDRESS, COUNT, INDEX
from deepseek_jax.train.hooks import Interrupt
from experiments import common
from experiments.launch.local import on_cores, shares, stop

POLL_S = 0.1
# For the others to end by themselves when one has: they say more than a killed one.
GRACE_S = 10.0
TRAIN = (sys.executable, "-m", "experiments.train")


@dataclass
class Job:
    """One of the processes."""

    index: int
    process: subprocess.Popen[bytes]
    log: Path
    copying: threading.Thread | None = None

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None


def run(words: Sequence[str], count: int, folder: Path, gpus: int = 1) -> int:
    """Runs `words` as `count` processes.

    Args:
      words: a command that calls `parallel.cluster.initialize`.
      folder: where the logs go.
      gpus: of each process, if there are any.

    Returns:
      0; else the exit code of the process that failed first; 130 after a Ctrl-C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = f"localhost:{free_port()}"
    jobs: list[Job] = []
    with Interrupt(say) as interrupt:
        try:
            for index, cores in enumerate(shares(count)):
                with on_cores(cores):
                    jobs.append(start(words, index, count, address, folder, gpus))
            while not all(job.ended for job in jobs) and not interrupt.received:
                if failed := [job for job in jobs if job.process.poll()]:
                    return give_up(jobs, failed)
                time.sleep(POLL_S)
        finally:
            stop(jobs)
    if interrupt.received:
        say("stopped; the same command goes on from here")
        return common.INTERRUPTED
    failed = [job for job in jobs if job.process.returncode]
    return give_up(jobs, failed) if failed else 0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    words: Sequence[str], index: int, count: int, address: str, folder: Path, gpus: int
) -> Job:
    """Starts a process; what the first one says is copied to here."""
    log = folder / f"log.{index}.txt"
    devices = ",".join(str(index * gpus + gpu) for gpu in range(gpus))
    own = {ADDRESS: address, COUNT: str(count), INDEX: str(index)}
    with log.open("ab", buffering=0) as file:
        file.write(f"{runs.LOG_START}{shlex.join(words)}\n".encode())
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if index == 0 else file,
            stderr=subprocess.STDOUT,
            env={"JAX_LOCAL_DEVICE_IDS": devices}
            | os.environ
            | own
            | {common.PARENT: str(os.getpid())},
            start_new_session=True,  # Ctrl-C reaches it once, from here
        )
    copying = None
    if process.stdout:
        copying = threading.Thread(target=copy, args=(process.stdout, log))
        copying.start()
    return Job(index, process, log, copying)


def copy(stream: IO[bytes], log: Path) -> None:
    """Copies what comes to the terminal and to a log, until it ends."""
    with stream, log.open("ab", buffering=0) as file:
        while part := stream.read1(1 << 16):  # type: ignore[attr-defined]
            file.write(part)
            sys.stderr.buffer.write(part)
            sys.stderr.flush()


def give_up(jobs: Sequence[Job], failed: Sequence[Job]) -> int:
    """Says which process failed, and ends those that do not end by themselves."""
    until = time.monotonic() + GRACE_S
    while not all(job.ended for job in jobs) and time.monotonic() < until:
        time.sleep(POLL_S)
    hanging = [job for job in jobs if not job.ended]
    for job in hanging:
        job.process.kill()
    for job in jobs:
        job.process.wait()
        if job.copying:
            job.copying.join()
    rest = [job for job in jobs if job not in (*failed, *hanging)]
    first = cause([*failed, *rest])
    code = first.process.returncode
    if code == common.INTERRUPTED:
        say(f"{runs.last_error(first.log)}; the same command goes on from here")
        return code
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    told = f": {runs.last_error(first.log)}" if code > 0 else ""
    say(
        f"process {first.index} of {len(jobs)} ended ({how}){told}. The others were "
        f"stopped; {first.log.parent}/log.*.txt have what each said. The same command "
        "goes on from the last checkpoint"
    )
    return code if code > 0 else common.STOPPED


def cause(ended: Sequence[Job]) -> Job:
    """The one of those that ended, the earliest first, that had a reason of its own.

    The others die of its death: JAX aborts them, or their exchange with it fails.
    """

    def own(job: Job) -> int:
        code = job.process.returncode
        if code == common.BAD_INPUT:
            return 0
        if code == 0 or code == -signal.SIGABRT:
            return 3
        return 2 if common.GONE in runs.last_error(job.log) else 1

    return min(ended, key=own)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def workdir(flags: Sequence[str]) -> Path:
    """The value of --workdir.

    Raises:
      ValueError: there is none.
    """
    value = ""
    for flag, after in zip(flags, [*flags[1:], ""]):
        if flag == "--workdir":
            value = after
        elif flag.startswith("--workdir="):
            value = flag.partition("=")[2]
    if not value:
        raise ValueError("--workdir is missing after --, for example --workdir=runs/a")
    return Path(value)


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    flags = arguments[cut + 1 :]
    parser = common.arguments("experiments.launch.processes", __doc__)
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--gpus", type=int, default=1, help="of each, if there are any")
    options = parser.parse_args(arguments[:cut])
    for name in ("processes", "gpus"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}: must be 1 or more")
    return run([*TRAIN, *flags], options.processes, workdir(flags), options.gpus)


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
