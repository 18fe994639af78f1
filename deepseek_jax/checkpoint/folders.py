"""A run's checkpoints on disk: where they lie, and whether they are still whole.

DIR/checkpoints/<step>/ has the items `state` (arrays, Orbax's format), `data` (the
position of the data iterator, JSON), `config` (what `metadata.describe` gives, JSON);
of a run with `optim.ema`, `average` (the mean of the parameters, arrays); and of a step
that was evaluated, `metrics` (JSON), beside `digests.json`: size and CRC-32 of every
file of theirs. Ours: without it Orbax 0.12 restores a flipped byte without a word.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

FOLDER = "checkpoints"
ITEMS = ("state", "data", "config")
AVERAGE = "average"
METRICS = "metrics"  # Orbax's name for what it ranks checkpoints by
SOURCE = "source"  # beside them in a converted step: what it was converted from
DIGESTS = "digests.json"

Say = Callable[[str], None]


def steps(root: Path) -> list[int]:
    """Steps with a checkpoint under `root`, whole or damaged, in order."""
    if not root.is_dir():
        return []
    return sorted(
        int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir()
    )


def resolve(path: str | Path) -> tuple[Path, int | None]:
    """(checkpoints folder, step or None) of a workdir, its checkpoints/, or one step.

    Raises:
      ValueError: `path` is none of the three, or holds no checkpoint.
    """
    path = Path(path).absolute()
    if path.name.isdigit() and (path / ITEMS[0]).is_dir():
        return path.parent, int(path.name)
    for root in (path / FOLDER, path):
        if steps(root):
            return root, None
    there = steps(path.parent) if path.name.isdigit() else []
    inside = sorted(p.parent.name for p in path.glob(f"*/{FOLDER}") if steps(p))
    why = "is not there" if not path.exists() else "holds no checkpoint"
    hint = f"; {path.parent} has the steps {there}" if there else ""
    if inside:
        hint = f"; it has {len(inside)} runs, such as {path / inside[0]}"
    raise ValueError(
        f"{path} {why}{hint}: give a workdir, its {FOLDER}/, or one step such as "
        f"{FOLDER}/100"
    )


def write_digests(step_dir: Path) -> None:
    """Records size and CRC-32 of every file of a step's items."""
    digests = {}
    for item in (*ITEMS, AVERAGE, METRICS, SOURCE):
        for file in sorted((step_dir / item).rglob("*")):
            if file.is_file():
                digests[str(file.relative_to(step_dir))] = _digest(file)
    (step_dir / DIGESTS).write_text(json.dumps(digests), "utf-8")


def find_damage(step_dir: Path) -> str | None:
    """What is wrong with a step's files, None if they are as they were written.

    Raises:
      OSError: a file that is there could not be read, which says nothing about it.
    """
    try:
        digests = json.loads((step_dir / DIGESTS).read_text("utf-8"))
        known = {name: (int(size), int(crc)) for name, (size, crc) in digests.items()}
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except (ValueError, TypeError, AttributeError) as error:
        return f"{DIGESTS} is damaged ({error})"
    for item in ITEMS:
        if not any(name.startswith(f"{item}/") for name in known):
            return f"it was written without {item}"
    for name, (size, crc) in known.items():
        try:
            found = _digest(step_dir / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
        if found[0] != size:
            return f"{name} has {found[0]} bytes instead of {size}"
        if found[1] != crc:
            return f"{name} has changed since it was written"
    return None


def _digest(file: Path) -> tuple[int, int]:
    size = crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return size, crc


def newest_good(root: Path) -> int | None:
    """The newest step whose files are as they were written."""
    good = (
        step for step in reversed(steps(root)) if find_damage(root / str(step)) is None
    )
    return next(good, None)


def choose(
    root: Path, step: int | None = None, say: Say = lambda text: None
) -> int | None:
    """The newest good step, or `step` if it is good; None where there is no checkpoint.

    Args:
      say: told about every damaged checkpoint that is passed over.

    Raises:
      ValueError: `step` is damaged, or all are.
      OSError: as `find_damage`.
    """
    damage = {}
    for candidate in reversed(steps(root)) if step is None else [step]:
        found = find_damage(root / str(candidate))
        if found is None:
            return candidate
        damage[candidate] = found
        if step is None:
            say(f"checkpoint {root / str(candidate)} is damaged: {found}")
    if step is not None:
        good = newest_good(root)
        rest = (
            "no other one is good"
            if good is None
            else f"step {good} is the newest good one"
        )
        raise ValueError(
            f"checkpoint {root / str(step)} is damaged: {damage[step]}; {rest}"
        )
    if damage:
        raise ValueError(
            f"no checkpoint in {root} can be restored: "
            + "; ".join(f"step {s}: {why}" for s, why in damage.items())
            + ". Copy one back, or choose another --workdir"
        )
    return None
