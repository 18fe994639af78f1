"""Pictures of how kernels cut their work: tiles of matrices, and who has them.

Sizes come in as numbers, so that a picture is of the constants that a kernel has. A
colour is one of the warpgroups that multiply, grey a tile that is brought to shared
memory, pale what nobody computes.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLOURS = "#ee9b2d", "#4f74c9"  # of the warpgroups that multiply
BROUGHT, IDLE, OUTLINE = "#c9ccd3", "#f3f1ec", "#30343b"
INCHES = 4.2  # of the longest side of a matrix


class Tile(NamedTuple):
    """A part of a matrix: where it begins, how large it is, what is written in it."""

    row: int
    column: int
    rows: int
    columns: int
    colour: str
    text: str = ""


class Matrix(NamedTuple):
    """A matrix and its tiles; what it is called, and what its two axes are."""

    title: str
    rows: int
    columns: int
    tiles: Sequence[Tile]
    down: str = ""
    across: str = ""


def draw(matrices: Sequence[Matrix]) -> Figure:
    """The matrices side by side, each to a scale of its own."""
    figure = Figure((INCHES * len(matrices), INCHES + 0.6), layout="constrained")
    for axes, matrix in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices
    ):
        _draw(axes, matrix)
    return figure


def _draw(axes: Axes, matrix: Matrix) -> None:
    for tile in matrix.tiles:
        corner = tile.column, tile.row
        axes.add_patch(
            Rectangle(
                corner, tile.columns, tile.rows, fc=tile.colour, ec=OUTLINE, lw=0.6
            )
        )
        if tile.text:
            middle = tile.column + tile.columns / 2, tile.row + tile.rows / 2
            behind = "white" if tile.colour == "none" else tile.colour
            box = {"fc": behind, "ec": "none", "pad": 1}
            axes.text(
                *middle, tile.text, ha="center", va="center", fontsize=7, bbox=box
            )
    axes.set_xlim(0, matrix.columns)
    axes.set_ylim(matrix.rows, 0)
    axes.set_title(matrix.title, fontsize=10)
    axes.set_xlabel(matrix.across)
    axes.set_ylabel(matrix.down)


def attention(
    length: int, tile: int, rows: int, first: Sequence[int] | None = None
) -> Matrix:
    """Queries by keys: what causal attention in square tiles computes, and in turns.

    The number in a tile is when its thread block comes to it: on the diagonal first.

    Args:
      tile: query rows of a thread block, and keys that it takes at a time.
      rows: of them, a warpgroup's.
      first: the first tile of keys that each tile of queries sees; None: 0.
    """
    count = -(-length // tile)
    tiles = []
    for i in range(count):
        begin = first[i] if first is not None else 0
        for j in range(count):
            seen = begin <= j <= i
            for part in range(tile // rows):
                colour = COLOURS[part % len(COLOURS)] if seen else IDLE
                text = str(i - j + 1) if seen else ""
                at = i * tile + part * rows
                tiles.append(Tile(at, j * tile, rows, tile, colour, text))
    return Matrix("scores of a head", length, length, tiles, "queries", "keys")


def grouped(
    expert_n: Sequence[int],
    used: int,
    sizes: tuple[int, int, int],
    tile: tuple[int, int, int],
    at: tuple[int, int],
) -> list[Matrix]:
    """x, the experts' matrices one below the other, and y, with one tile of y.

    Args:
      expert_n: of each block of rows; those from `used` on are never read.
      sizes: experts, and rows and columns of each one's matrix.
      tile: rows of a block, columns of a tile of y, and what is brought of K a step.
      at: the tile of y whose operands are shown, by block and column of tiles.
    """
    experts, depth, columns = sizes
    rows, width, step = tile
    block, column = at
    steps = range(0, depth, step)
    brought = [Tile(block * rows, k, rows, step, BROUGHT) for k in steps]
    top, left = expert_n[block] * depth, column * width
    weights = [Tile(top + k, left, step, width, BROUGHT) for k in steps]
    half = rows // len(COLOURS)
    out = [
        Tile(block * rows + i * half, left, half, width, colour)
        for i, colour in enumerate(COLOURS)
    ]
    x = list(_outlines(len(expert_n), rows, depth, expert_n, used))
    y = list(_outlines(len(expert_n), rows, columns, expert_n, used))
    each = [
        Tile(e * depth, 0, depth, columns, "none", f"expert {e}")
        for e in range(experts)
    ]
    height = len(expert_n) * rows
    return [
        Matrix("x", height, depth, [*x, *brought], "rows, by expert", "D"),
        Matrix("w", experts * depth, columns, [*each, *weights], "experts, D", "F"),
        Matrix("y", height, columns, [*y, *out], "rows, by expert", "F"),
    ]


def _outlines(
    count: int, rows: int, columns: int, expert_n: Sequence[int], used: int
) -> Iterable[Tile]:
    for i in range(count):
        live = i < used
        text = f"expert {expert_n[i]}" if live else "unused"
        yield Tile(i * rows, 0, rows, columns, "none" if live else IDLE, text)
