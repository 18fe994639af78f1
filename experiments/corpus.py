"""Builds a corpus and says where it lies.

    python -m experiments.corpus                 the builtin one (`data.corpora`), 32 MB
    python -m experiments.corpus --debian        about 100 MB, eight domains
    python -m experiments.corpus --out DIR       also copies it to DIR
    python -m experiments.corpus --list          what has been built on this machine

Train on it with `--config.data.source=DIR`. The Debian corpus is made of documentation
and source packages of Debian's section main. They are downloaded and unpacked into a
temporary folder: this needs no root and changes nothing on the system. Their licences
stand in each package's usr/share/doc/*/copyright and, in short, in the manifest.
"""

import gzip
import html.parser
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.config import DataConfig
from deepseek_jax.data import corpora
from deepseek_jax.data.cache import default_cache, publish, unfinished
from deepseek_jax.data.corpus import MANIFEST, read_manifest, write_corpus
from deepseek_jax.data.documents import Document, cut_documents, deduplicate, document
from deepseek_jax.data.sources import open_corpus
from experiments import common

CAP = 16_000_000  # bytes of a domain of the Debian corpus
ARITHMETIC = 8_000_000
GLOSSES = 30  # WordNet entries of a document


class Source(NamedTuple):
    """Files of a Debian package; the newest that matches `package` is taken."""

    package: str
    domain: str
    pattern: str
    text: Callable[[str], str]
    licence: str


class _Html(html.parser.HTMLParser):
    """The text of a page, a line for each block."""

    BLOCK = re.compile("p|div|br|tr|li|dt|dd|h[1-6]|pre|table|title|blockquote")
    HIDDEN = re.compile("script|style|nav|head")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += bool(self.HIDDEN.fullmatch(tag))
        if self.BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - bool(self.HIDDEN.fullmatch(tag)))
        if self.BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def from_html(page: str) -> str:
    """The text of an HTML page, without navigation and runs of blank lines."""
    parser = _Html()
    parser.feed(page)
    lines = (line.rstrip() for line in "".join(parser.parts).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def from_wordnet(data: str) -> str:
    """The entries of a WordNet data file: words: what they mean and examples."""
    entries = []
    for line in data.splitlines():
        if line.startswith("  "):  # the licence at the top
            continue
        fields, _, gloss = line.partition(" | ")
        words = fields.split(" ")
        names = words[4 : 4 + 2 * int(words[3], 16) : 2]
        entries.append(f"{', '.join(names).replace('_', ' ')}: {gloss.strip()}\n")
    return "".join(entries)


def as_it_is(text: str) -> str:
    return text


DOC = "usr/share/doc"
SOURCES = (
    Source(
        r"anarchism", "essays", f"{DOC}/anarchism/markdown/*.md*", as_it_is, "GPL-2.0+"
    ),
    Source(
        r"linux-doc-[\d.]+",
        "kernel",
        f"{DOC}/linux-doc-*/html/_sources/**/*.rst.txt*",
        as_it_is,
        "GPL-2.0",
    ),
    Source(
        r"python3\.\d+-doc",
        "manuals",
        f"{DOC}/python3.*/html/_sources/**/*.rst.txt",
        as_it_is,
        "PSF-2.0",
    ),
    Source(
        r"postgresql-doc-\d+",
        "manuals",
        f"{DOC}/postgresql-doc-*/html/*.html",
        from_html,
        "PostgreSQL",
    ),
    Source(
        r"sqlite3-doc",
        "manuals",
        f"{DOC}/sqlite3/**/*.html",
        from_html,
        "public domain",
    ),
    Source(r"git-doc", "manuals", f"{DOC}/git-doc/**/*.txt*", as_it_is, "GPL-2.0"),
    Source(
        r"perl-doc",
        "manuals",
        "usr/share/perl/*/pod/*.pod",
        as_it_is,
        "Artistic or GPL-1.0+",
    ),
    Source(
        r"rust-src", "rust", "usr/src/rustc-*/**/*.rs", as_it_is, "MIT or Apache-2.0"
    ),
    Source(
        r"wordnet-base",
        "dictionary",
        "usr/share/wordnet/data.*",
        from_wordnet,
        "WordNet",
    ),
)


def find_packages() -> dict[Source, str]:
    """The name of the newest package for each source.

    Raises:
      ValueError: apt-get or dpkg is missing, or a package is not found.
    """
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if not shutil.which(tool):
            raise ValueError(
                f"--debian needs {tool}: run it on Debian or Ubuntu, then copy the "
                "folder that it prints"
            )
    known = _run("apt-cache", "pkgnames").split()
    found: dict[Source, str] = {}
    for source in SOURCES:
        if names := [name for name in known if re.fullmatch(source.package, name)]:
            found[source] = max(names, key=_version)
    if missing := [source.package for source in SOURCES if source not in found]:
        raise ValueError(
            f"no Debian package matches {', '.join(missing)}: run apt-get update; "
            "section main must be among the sources of apt"
        )
    return found


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, check=True, text=True, capture_output=True
        )
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"{' '.join(command)} failed: {error.stderr.strip()}"
        ) from None
    return done.stdout


def download(packages: dict[Source, str], folder: Path) -> dict[Source, Path]:
    """The packages' archives, in `folder`."""
    _run("apt-get", "download", *packages.values(), cwd=folder)
    found = {}
    for source, package in packages.items():
        (found[source],) = folder.glob(f"{package}_*.deb")
    return found


def about(source: Source, archive: Path) -> dict[str, str]:
    """Name, version and licence; an archive is named PACKAGE_VERSION_ARCHITECTURE.deb.

    The colon after an epoch, as in 1:2.39.5, is escaped in file names.
    """
    name, version, _ = urllib.parse.unquote(archive.name).split("_")
    return {"name": name, "version": version, "licence": source.licence}


def debian_documents(archives: dict[Source, Path]) -> Iterator[Document]:
    """Documents of the packages, unpacked beside their archives."""
    for source, archive in archives.items():
        tree = archive.with_suffix("")
        _run("dpkg", "-x", str(archive), str(tree))
        files = [path for path in sorted(tree.glob(source.pattern)) if path.is_file()]
        if not files:
            package = archive.name.partition("_")[0]
            raise ValueError(f"the package {package} has no {source.pattern}")
        for path in files:
            if "translations" not in path.parts:
                yield from _documents(source, path, path.relative_to(tree).as_posix())
        shutil.rmtree(tree)


def _documents(source: Source, path: Path, name: str) -> Iterator[Document]:
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    text = source.text(raw.decode("utf-8", errors="replace"))
    if source.domain == "dictionary":
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), GLOSSES):
            part = "".join(lines[start : start + GLOSSES])
            yield document(source.domain, part, f"{name}:{start}")
    elif len(text) >= corpora.LEAST and "\ufffd" not in text:
        yield document(source.domain, text, name)


def capped_by_digest(documents: Iterator[Document]) -> Iterator[Document]:
    """Of each domain the documents of smallest digest that fit in `CAP` bytes."""
    ordered = sorted(
        deduplicate(documents), key=lambda item: (item.domain, item.digest)
    )
    for _, group in itertools.groupby(ordered, key=lambda item: item.domain):
        yield from corpora.capped(group, CAP)


def build_debian(cache: Path) -> Path:
    """Downloads, converts and writes the Debian corpus; returns its folder."""
    packages = find_packages()
    with tempfile.TemporaryDirectory() as folder:
        archives = download(packages, Path(folder))
        sources = [about(source, archive) for source, archive in archives.items()]
        sources += map(corpora.source, (*corpora.PACKAGES, corpora.SPEECHES))
        sources += corpora.OTHERS
        documents = itertools.chain(
            debian_documents(archives),
            corpora.python_modules(),
            corpora.speeches(),
            corpora.capped(corpora.word_problems(), ARITHMETIC),
        )
        pieces = cut_documents(capped_by_digest(documents))
        return write_corpus(pieces, cache / "corpora", sources)


def describe(root: Path) -> str:
    """A corpus as a table: documents and megabytes of each domain."""
    manifest = read_manifest(root)
    lines = [f"{root}"]
    for name, count in manifest["domains"].items():
        megabytes = count["bytes"] / 1e6
        lines.append(
            f"  {name:<16} {count['documents']:>8} documents {megabytes:8.2f} MB"
        )
    return "\n".join(lines)


def print_all(cache: Path) -> None:
    """Prints what has been built in `cache`, and what is wrong with it if so."""
    built = sorted((cache / "corpora").glob(f"*/{MANIFEST}"))
    for manifest in built:
        try:
            print(describe(manifest.parent))
        except ValueError as error:
            print(error)
    if not built:
        build = common.command("experiments.corpus")
        print(f"nothing built yet in {cache}: run {build}")


def copy_to(root: Path, out: Path) -> Path:
    """Copies a corpus folder to `out`, which must not exist yet."""
    if out.exists():
        raise ValueError(f"--out {out} exists; name a folder that doesn't")
    with unfinished(out.resolve().parent) as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True)
        return publish(folder, out)


def main(arguments: list[str] | None = None) -> None:
    parser = common.arguments("experiments.corpus", __doc__)
    parser.add_argument("--debian", action="store_true", help="the Debian corpus")
    parser.add_argument("--out", type=Path, help="a folder to copy the corpus to")
    parser.add_argument("--list", action="store_true", help="list what has been built")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="%(default)s"
    )
    options = parser.parse_args(arguments)
    if options.list:
        print_all(options.cache)
        return
    if options.debian:
        root = build_debian(options.cache)
    else:
        root = open_corpus(DataConfig(), options.cache).root
    if options.out:
        root = copy_to(root, options.out)
    print(describe(root))


if __name__ == "__main__":
    sys.exit(common.guarded(main))
