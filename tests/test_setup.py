"""Set-up: everything is pinned, the two commands exist, a wrong Python is refused, and tests stay on this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ["3.11", "3.12", "3.13"]
# What torch's CUDA builds need besides; torch pins these itself, and its CPU builds do not have them.
OF_TORCH = re.compile(r"nvidia-|cuda-|triton")


def test_every_dependency_is_pinned_at_the_installed_version() -> None:
    installed = {name: Version(metadata.version(name)).public for name in _required()}
    pinned = _pins()
    assert pinned["torch"] == "2.13.0"
    assert {name: pinned.get(name) for name in installed} == installed
    assert set(pinned) == set(installed), "pinned, but nothing needs it"


def test_pins_satisfy_what_the_project_asks_for() -> None:
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(
            text
            for extra in ("dev", "transformers", "onnx", "arrow")
            for text in project["optional-dependencies"][extra]
        ),
        *PROJECT["build-system"]["requires"],
    ]
    pinned = _pins()
    for requirement in map(Requirement, wanted):
        if requirement.name == "xded":  # dev's own extras
            assert requirement.extras == {"transformers", "onnx", "arrow"}
            continue
        text = str(requirement)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_supported_pythons() -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(9, 16) if f"3.{minor}.1" in supported] == PYTHONS
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"


def test_every_make_command_of_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    ("target", "command"),
    [("demo", ".venv/bin/xded demo --out work/demo"), ("test", ".venv/bin/python -m pytest")],
)
def test_make_installs_and_runs(tmp_path: Path, target: str, command: str) -> None:
    commands = _make(tmp_path, target, "--dry-run").stdout.splitlines()
    installs = [line for line in commands if "pip install" in line]
    assert " torch" in installs[0], "torch goes first"
    assert all("-c constraints.txt" in line for line in installs)
    assert commands[-1] == command


@pytest.mark.parametrize(("version", "accepted"), [("3.10", False), *((v, True) for v in PYTHONS), ("3.14", False)])
def test_wrong_python_is_refused_in_a_sentence(tmp_path: Path, version: str, accepted: bool) -> None:
    major, minor = version.split(".")
    python = tmp_path / "fake-python"  # says that it is another version; can do no more than that
    python.write_text(
        f"#!/bin/sh\n"
        f'case "$1" in\n'
        f"--version) echo Python {version}.1 ;;\n"
        f'-c) exec "{sys.executable}" -c "import sys; sys.version_info = ({major}, {minor}, 1); $2" ;;\n'
        f"*) echo made a venv; exit 1 ;;\n"
        f"esac\n"
    )
    python.chmod(0o755)
    done = _make(tmp_path, "test", f"PYTHON={python}")
    assert done.returncode != 0
    assert ("made a venv" in done.stdout) == accepted
    refusal = f"xded needs Python 3.11, 3.12 or 3.13, but {python} is Python {version}.1. Name another: make test "
    assert (refusal in done.stderr) != accepted


def test_ci_runs_the_tests() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_readme_lists_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("```text\nsrc/xded/\n", 1)[1].split("```", 1)[0]
    assert _listed(tree) == {path.relative_to(ROOT / "src/xded").as_posix() for path in _described_files()}


def test_every_command_of_the_readme_is_understood() -> None:
    from typer.testing import CliRunner

    from xded.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:\.venv/bin/)?xded (.+)$", readme, re.MULTILINE)
    verbs = set()
    for command in commands:
        words = re.split(r" [^a-z]| \S*[/.=]", command)[0].split()  # up to the first argument or flag
        verbs.add(words[0])
        shown = CliRunner().invoke(app, [*words, "--help"])
        assert shown.exit_code == 0, f"xded {command}\n{shown.output}"
        for flag in re.findall(r"(?<= )--[a-z-]+", command):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown.output), f"xded {command}: no {flag}"
    assert verbs == {command.name for command in app.registered_commands} | {g.name for g in app.registered_groups}


def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src/xded", tmp_path / "src/xded", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("xded-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("xded/")}
    assert held == {path.relative_to(ROOT / "src").as_posix() for path in _package_files()}


def test_network_is_closed() -> None:
    with pytest.raises(PermissionError, match="reached for the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)  # an address of documentation: nobody has it
    with pytest.raises(PermissionError, match="reached for the network"):
        socket.getaddrinfo("example.invalid", 80)


def test_network_is_closed_for_processes_that_tests_start() -> None:
    program = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=0.1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "PermissionError: A test reached for the network" in done.stderr


def test_loopback_is_open() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1])),
    ):
        pass


def test_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make in a folder that holds what the Makefile reads, and no .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _pins() -> dict[str, str]:
    """Name and exact version of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins: dict[str, str] = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not an exact pin"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def _required() -> set[str]:
    """Names of all that xded[dev] and its build need on this Python, transitively, by what is installed."""
    found: set[str] = set()
    todo = [
        ("xded", frozenset({"dev"})),
        *((Requirement(r).name, frozenset()) for r in PROJECT["build-system"]["requires"]),
    ]
    seen = set()
    while todo:
        name, extras = todo.pop()
        name = canonicalize_name(name)
        if (name, extras) in seen or OF_TORCH.match(name):
            continue
        seen.add((name, extras))
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return found - {"xded"}


def _package_files() -> list[Path]:
    return [path for path in (ROOT / "src/xded").rglob("*") if path.is_file() and path.suffix != ".pyc"]


def _described_files() -> list[Path]:
    """Source files with something to say: an __init__.py of one docstring and an empty marker have not."""
    return [f for f in _package_files() if f.suffix == ".yaml" or len(f.read_text().splitlines()) > 3]


def _listed(tree: str) -> set[str]:
    """Paths of a tree of the README: folders end in '/', two more spaces per level, a description after the name."""
    paths: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            paths.add("".join(folders) + name)
    return paths
