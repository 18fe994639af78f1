"""DeepSeek-V3 (arXiv:2412.19437) in JAX: a laboratory for small replicas."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax.config import Config
    from deepseek_jax.tokenizer import Tokenizer

__version__ = "0.1.0"


def load(path: str | Path) -> "tuple[Config, dict[str, Any], Any, Tokenizer]":
    """(config, params, balance, tokenizer) of a run's newest good checkpoint.

    Args:
      path: a workdir, its checkpoints/, or one step.

    Raises:
      ValueError: there is no good checkpoint at `path`.
    """
    import dataclasses

    import jax

    from deepseek_jax import tokenizer
    from deepseek_jax.checkpoint import folders, manager
    from deepseek_jax.config import Config, MeshConfig, from_dict
    from deepseek_jax.train.state import assemble, init_state

    root, step = folders.resolve(path)
    config = from_dict(Config, manager.read_config(root, step)["config"])
    # The run may have had more devices than there are here.
    parts = assemble(dataclasses.replace(config, mesh=MeshConfig()))
    like = jax.eval_shape(lambda: init_state(parts, config.seed))
    skipped = jax.tree.map(lambda _: manager.SKIP, like.opt_state)
    restored = manager.restore(root, like._replace(opt_state=skipped), step=step)
    assert restored is not None
    state = restored.state
    vocabulary = tokenizer.load(root.parent / "tokenizer")
    return config, state.params, state.balance, vocabulary
