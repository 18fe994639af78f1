"""A save that failed is not waited for; reading alone waits for nobody."""

import threading

from deepseek_jax.checkpoint.barrier import Barrier


def finish(barrier):
    """As Orbax's own thread calls it when a save ends, whole or not."""
    call = {"key": "set_value_start", "timeout_ms": 1}
    thread = threading.Thread(target=barrier, kwargs=call, name="save_finalize")
    thread.start()
    thread.join()


def test_only_a_save_that_failed_does_not_wait():
    waited = []
    barrier = Barrier()
    barrier.wait = lambda key, timeout_ms: waited.append(key)
    barrier.committed = False
    barrier(key="set_value_start", timeout_ms=1)  # by the main thread, at the start
    finish(barrier)
    assert waited == ["set_value_start"]
    barrier(key="12.async_commit_complete.tmp", timeout_ms=1)
    finish(barrier)
    assert waited[1:] == ["12.async_commit_complete.tmp", "set_value_start"]
