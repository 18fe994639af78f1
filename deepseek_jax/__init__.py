"""DeepSeek-V3 (arXiv:2412.19437) in JAX: a laboratory for small replicas."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax.config import Config
    from deepseek_jax.tokenizer import Tokenizer

__version__ = "0.1.0"


def load(
    path: str | Path, average: bool = False
) -> "tuple[Config, dict[str, Any], Any, Tokenizer | None]":
    """(config, params, balance, tokenizer) of a run's newest good checkpoint.

    Parameters are float32. The tokenizer is None for a checkpoint that was converted
    from files without one that can be read; a warning says why it cannot.

    Args:
      path: a workdir, its checkpoints/, or one step.
      average: the parameters are the mean that a run with `optim.ema` keeps of them;
        the router biases are the last step's all the same.

    Raises:
      ValueError: there is no good checkpoint at `path`, or it holds no mean; or the
        tokenizer beside it is another one than the run was trained with.
    """
    import dataclasses
    import warnings

    import jax
    import jax.numpy as jnp

    from deepseek_jax import tokenizer
    from deepseek_jax.checkpoint import folders, manager
    from deepseek_jax.config import Config, MeshConfig, from_dict
    from deepseek_jax.train.state import assemble, init_state

    root, step = folders.resolve(path)
    description = manager.read_config(root, step)
    config = from_dict(Config, description["config"])
    # The run may have had more devices than there are here.
    parts = assemble(dataclasses.replace(config, mesh=MeshConfig()))
    like = jax.eval_shape(lambda: init_state(parts, config.seed))
    wanted = {"params": like.params, "balance": like.balance}
    restored = manager.restore(root, wanted, step=step, partial=True)
    assert restored is not None
    params = restored.state["params"]
    if average:
        mean = manager.restore_average(root, restored.step, like.params)
        if mean is None:
            raise ValueError(
                f"average = True: {root / str(restored.step)} holds no mean of the "
                "parameters, as its run had optim.ema = 0; must be False"
            )
        params = jax.tree.map(jnp.asarray, mean)
    folder, trained = root.parent / "tokenizer", description["tokenizer"]["hash"]
    vocabulary = None
    try:
        vocabulary = tokenizer.load(folder) if trained or folder.is_dir() else None
    except ValueError as error:
        if trained:
            raise
        warnings.warn(f"no tokenizer for {root.parent}: {error}", stacklevel=2)
    if vocabulary and trained and vocabulary.hash != trained:
        raise ValueError(
            f"{folder} holds another tokenizer (hash {vocabulary.hash}) than the "
            f"checkpoint was trained with (hash {trained}); copy that one back"
        )
    return config, params, restored.state["balance"], vocabulary
