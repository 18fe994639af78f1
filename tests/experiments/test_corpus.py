"""The corpus command: conversions, a Debian build from stand-in tools, errors."""

import gzip
import json

import pytest

from deepseek_jax.data import corpora
from deepseek_jax.data.corpus import read_manifest, write_corpus
from deepseek_jax.data.documents import document
from experiments import corpus as command


def test_html_becomes_its_text():
    page = (
        "<html><head><title>no</title></head><body><nav>menu</nav><h1>Head &amp; "
        "foot</h1><p>One <b>two</b>.<script>x</script><pre>a\n  b</pre></body></html>"
    )
    lines = command.from_html(page).split("\n")
    assert [line for line in lines if line] == ["Head & foot", "One two.", "a", "  b"]
    assert "\n\n\n" not in command.from_html(page)


def test_wordnet_becomes_a_dictionary():
    data = (
        "  1 This software and database is being provided\n"
        '00001740 03 n 02 entity 0 living_thing 0 003 ~ 1 n 0000 | what exists; "x"  \n'
    )
    assert command.from_wordnet(data) == 'entity, living thing: what exists; "x"\n'


@pytest.fixture
def debian(monkeypatch, tmp_path):
    """Debian's tools, played by a function that unpacks a tree for each package."""

    def run(program, *arguments, cwd=None):
        if program == "apt-cache":
            return "linux-doc-6.1\nlinux-doc-6.12\nlinux-doc-6.9\nanarchism\nother\n"
        if program == "apt-get":
            for package in arguments[1:]:
                (cwd / f"{package}_1%3a2.0-1_all.deb").write_text(package)
            return ""
        _, archive, tree = arguments
        package = archive.rsplit("/", 1)[-1].split("_")[0]
        base = command.Path(tree) / "usr/share/doc" / package
        for number in range(3):
            text = f"{package} page {number}\n" * 20
            if package == "anarchism":
                file = base / f"markdown/{number}.md.gz"
                content = gzip.compress(text.encode())
            else:
                file = base / f"html/_sources/{number}.rst.txt"
                content = text.encode()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return ""

    monkeypatch.setattr(command, "SOURCES", command.SOURCES[:2])
    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(command.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    few = [document("code", "def f(): pass", "f.py")]
    monkeypatch.setattr(corpora, "python_modules", lambda: few)
    monkeypatch.setattr(corpora, "speeches", lambda: few)
    monkeypatch.setattr(command, "ARITHMETIC", 1000)
    return tmp_path


def test_debian_corpus(debian, capsys):
    command.main(["--debian", "--cache", str(debian), "--out", str(debian / "out")])
    printed = capsys.readouterr().out
    assert str(debian / "out") in printed
    manifest = read_manifest(debian / "out")
    counts = {name: count["documents"] for name, count in manifest["domains"].items()}
    assert counts["essays"] == counts["kernel"] == 3
    assert counts["code"] == 1
    assert 1 <= counts["arithmetic"] <= 10
    versions = {source["name"]: source["version"] for source in manifest["sources"]}
    assert versions["linux-doc-6.12"] == versions["anarchism"] == "1:2.0-1"
    assert "linux-doc-6.9" not in versions


def test_missing_packages_are_named(debian, monkeypatch, capsys):
    monkeypatch.setattr(command, "_run", lambda *a, **k: "linux-doc-6.1\n")
    with pytest.raises(ValueError, match="no Debian package matches anarchism:"):
        command.main(["--debian", "--cache", str(debian)])


def test_a_package_without_its_files_is_named(debian, monkeypatch):
    moved = command.SOURCES[0]._replace(pattern="usr/elsewhere/*")
    monkeypatch.setattr(command, "SOURCES", (moved,))
    with pytest.raises(ValueError, match="anarchism has no usr/elsewhere"):
        command.main(["--debian", "--cache", str(debian)])


def test_no_apt(monkeypatch, tmp_path):
    monkeypatch.setattr(command.shutil, "which", lambda tool: None)
    with pytest.raises(ValueError, match="--debian needs apt-get: run it on Debian"):
        command.main(["--debian", "--cache", str(tmp_path)])


def test_a_tool_that_fails():
    with pytest.raises(ValueError, match=r"ls /no/such/folder failed: .*No such file"):
        command._run("ls", "/no/such/folder")


def test_list_before_a_first_build(tmp_path, capsys):
    command.main(["--list", "--cache", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "nothing built yet" in printed
    assert "python -m experiments.corpus" in printed


def test_list_names_a_damaged_corpus_and_goes_on(tmp_path, capsys):
    roots = sorted(
        write_corpus([document("d", text, "n")], tmp_path / "corpora")
        for text in ("one", "two")
    )
    (roots[0] / "documents.jsonl").write_text("")
    command.main(["--list", "--cache", str(tmp_path)])
    damaged, whole, _ = capsys.readouterr().out.splitlines()
    assert f"{roots[0]}/documents.jsonl is missing or damaged" in damaged
    assert whole == str(roots[1])


def test_list_and_an_existing_out(tmp_path, monkeypatch, capsys):
    texts = [document("d", f"text {i}", "n") for i in range(3)]
    root = write_corpus(texts, tmp_path / "corpora")
    command.main(["--list", "--cache", str(tmp_path)])
    printed = capsys.readouterr().out
    assert str(root) in printed
    assert "3 documents" in printed
    with pytest.raises(ValueError, match="exists; name a folder that doesn't"):
        command.copy_to(root, tmp_path)
    copied = command.copy_to(root, tmp_path / "copy")
    assert json.loads((copied / "manifest.json").read_text()) == read_manifest(root)
