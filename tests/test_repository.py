"""The files around the code: pins, declared packages, make targets, set-up scripts."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deepseek_jax.data import corpora

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = ("test", "notebooks", "parity")

# Import name -> package, where they are not the same word.
PACKAGES = {"absl": "absl-py", "orbax": "orbax-checkpoint"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def needed(requirements: list[str]) -> set[str]:
    """The names that the requirements need, by what is installed here, transitively."""
    found: set[str] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            inner = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue  # an extra that this environment was made without
        for each in ("", *requirement.extras):
            queue += [(Requirement(text), each) for text in inner]
    return found


def imported(*folders: str) -> set[str]:
    """Top-level names of everything outside the standard library that is imported."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - set(folders)


def test_constraints_pin_everything():
    wanted = PROJECT["dependencies"] + [
        text for name in PINNED for text in EXTRAS[name]
    ]
    assert needed(wanted) - set(pins()) == set()
    assert all(re.fullmatch(r"[\w.+-]+", version) for version in pins().values())


def test_pins_fit_what_the_project_asks_for():
    pinned = pins()
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_plugins_are_those_of_the_pinned_jax():
    version = pins()["jax"]
    assert pins()["jaxlib"] == version
    plugins = [Requirement(text) for name in ("cuda", "aot") for text in EXTRAS[name]]
    assert {str(plugin.specifier) for plugin in plugins} == {f"=={version}"}


def test_what_is_imported_is_what_is_declared():
    names = imported("deepseek_jax", "pallas_kernels", "experiments", "benchmarks")
    used = {PACKAGES.get(name, name.replace("_", "-")) for name in names}
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    parity = {Requirement(text).name for text in EXTRAS["parity"]}
    assert used - core - parity == set()
    assert core - used <= {*corpora.PACKAGES, corpora.SPEECHES}


def test_the_packages_whose_text_is_the_corpus_are_pinned():
    assert {canonicalize_name(name) for name in corpora.PACKAGES} <= set(pins())
    assert corpora.SPEECHES in pins()


def test_every_folder_of_the_library_is_a_package():
    for top in ("deepseek_jax", "pallas_kernels"):
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    run = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True)
    listed = {line.split()[0] for line in run.stdout.splitlines() if line[:1].isalpha()}
    assert targets <= listed
    assert {"setup", "demo", "test", "test-all", "bench", "notebooks"} <= targets


@pytest.mark.parametrize("target", ["demo", "test", "bench", "notebooks", "lab"])
def test_a_target_sets_up_first(target):
    command = ["make", "-C", ROOT, "--dry-run", "--always-make", target]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.index("tools/setup.sh") < run.stdout.rindex(".venv/bin/")


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert {"set -euo pipefail", "make test"} <= set(script.read_text().splitlines())


@pytest.fixture
def machine(tmp_path):
    """A machine with the Pythons that a test puts there and what the script needs."""
    (tmp_path / "bin").mkdir()
    for tool in ("cat", "ls", "sort"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def put(path: str, script: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{shutil.which('sh')}\n{script}\n")
        file.chmod(0o755)

    def find(**env: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **env}
        command = [shutil.which("sh"), ROOT / "tools/find_python.sh"]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    return put, find


SHIM = "echo 'python3.12: command not found' >&2; exit 127"
NO_VENV = "echo \"No module named 'ensurepip'\" >&2; exit 1"


@pytest.mark.parametrize(
    ("pythons", "found"),
    [
        ({"bin/python3.12": "echo 3.12 /a"}, "/a"),
        ({"bin/python3": "echo 3.12 /a"}, "/a"),
        ({"bin/python3.12": SHIM, "bin/python3.13": "echo 3.13 /b"}, "/b"),
        ({"bin/python3.12": NO_VENV, "bin/python": "echo 3.14 /c d"}, "/c d"),
        ({"bin/python3": "echo 3.14 /a", "bin/python3.13": "echo 3.13 /b"}, "/b"),
        (
            {
                "bin/python3.12": SHIM,
                "bin/python3": "echo 3.11 /old",
                ".pyenv/versions/3.9.1/bin/python3": "echo 3.9 /older",
                ".pyenv/versions/3.12.1/bin/python3": "echo 3.12 /pyenv",
            },
            "/pyenv",
        ),
        ({"bin/uv": "echo $0-python", "bin/uv-python": "echo 3.12 /uv"}, "/uv"),
    ],
)
def test_a_python_is_found(machine, pythons, found):
    put, find = machine
    for path, script in pythons.items():
        put(path, script)
    run = find()
    assert (run.returncode, run.stdout, run.stderr) == (0, found + "\n", "")


def test_without_a_python_the_script_says_what_to_install(machine):
    put, find = machine
    put("bin/python3.12", SHIM)
    put("bin/python3", "echo 3.11 /old")
    run = find()
    assert (run.returncode, run.stdout) == (1, "")
    assert "No usable Python 3.12" in run.stderr
    assert "python3-venv" in run.stderr


def test_a_named_python_is_the_only_one_asked(machine, tmp_path):
    put, find = machine
    put("bin/python3.12", "echo 3.12 /a")
    put("mine", "echo 3.13 /mine")
    assert find(PYTHON=str(tmp_path / "mine")).stdout == "/mine\n"
    assert find(PYTHON=str(tmp_path / "absent")).returncode == 1
