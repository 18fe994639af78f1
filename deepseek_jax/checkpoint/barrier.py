"""How processes wait for one another in Orbax, and where they must not.

Ours; the report (arXiv:2412.19437) says nothing about checkpoints.
"""

import threading

import jax
import orbax.checkpoint as ocp


class Barrier:
    """Where processes wait for one another in a save, unless this one's has failed.

    Orbax 0.12 has the process whose save failed wait for the others to finish it, which
    wait for this process elsewhere: it could not say what is wrong.
    """

    def __init__(self) -> None:
        self.wait = ocp.multihost.get_barrier_sync_fn()
        self.committed = True

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        finishing = threading.current_thread().name == "save_finalize"
        if finishing and not self.committed:
            return
        self.wait(key=key, timeout_ms=timeout_ms)
        self.committed |= "async_commit_complete" in key


def reading(*, alone: bool = False) -> ocp.Checkpointer:
    """What reads a checkpoint; `alone` if only this process does."""
    options = ocp.options.MultiprocessingOptions()
    if alone:
        mine = jax.process_index()
        options = ocp.options.MultiprocessingOptions(mine, {mine}, f"alone_{mine}")
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options)
        ),
        multiprocessing_options=options,
    )
