"""The house rules: clean under every checker, small files and functions, no construct that is forbidden."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
FILES = sorted([*SRC.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
BIN = Path(sys.executable).parent

FILE_LINES = 500
FUNCTION_LINES = 60
# "path::function": why it may be longer. An entry that is no longer needed fails.
LONG_FUNCTIONS: dict[str, str] = {}

FORBIDDEN_IMPORTS = (
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),  # run code when they read a file
    *("requests", "urllib.request", "urllib3", "http", "httpx", "aiohttp", "socket", "ftplib"),  # reach the network
)
FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "__import__"), "runs text as code"),
    **dict.fromkeys(("importlib.import_module", "import_module"), "imports by a name that may come from a file"),
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.unsafe_load"), "may build any object: yaml.safe_load"),
}
IMPORT_OF_EXTRAS = ("import_module", "src/xded/errors.py")  # `need_extra`, whose callers write the name down
TORCH_LOAD_IN = "src/xded/models/checkpoints.py"
OUTSIDE = re.compile(r"(?<![\w.~}/-])/(?:home|root|work|tmp|opt|mnt|Users)/\w")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([sys.executable, "-m", "ruff", "check"], id="ruff check"),
        pytest.param([sys.executable, "-m", "ruff", "format", "--check"], id="ruff format"),
        pytest.param([sys.executable, "-m", "mypy"], id="mypy"),
        pytest.param([str(BIN / "lint-imports"), "--no-logo"], id="import-linter"),
    ],
)
def test_checker_finds_nothing(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_files_are_short() -> None:
    lines = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: number for name, number in lines.items() if number > FILE_LINES}


def test_functions_are_short() -> None:
    lengths = {key: lines for path in FILES for key, lines in _function_lengths(_name(path), _parse(path))}
    long = {key: lines for key, lines in lengths.items() if lines > FUNCTION_LINES}
    assert not {key: lines for key, lines in long.items() if key not in LONG_FUNCTIONS}, f"over {FUNCTION_LINES} lines"
    assert not LONG_FUNCTIONS.keys() - long.keys(), "exceptions that are no longer needed"


def test_no_forbidden_construct() -> None:
    paths = [path for path in FILES if path.is_relative_to(SRC)]
    assert [finding for path in paths for finding in _forbidden(_name(path), path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["README.md", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run"])
def test_no_path_of_somebodys_machine(name: str) -> None:
    assert OUTSIDE.findall((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "from urllib import request",
        "def f():\n    import requests.sessions",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "f(weights_only=False)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "importlib.import_module(name)",
        "from yaml import load",
        "try:\n    f()\nexcept Exception:\n    pass",
        "for _ in x:\n    try:\n        f()\n    except (ValueError, Exception) as error:\n        continue",
        "try:\n    f()\nexcept:\n    ...",
        "DATA = '/home/me/corpus'",
    ],
)
def test_forbidden_construct_is_seen(text: str) -> None:
    assert len(_forbidden("src/xded/x.py", text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "from urllib.parse import quote",
        "try:\n    f()\nexcept OSError:\n    pass",
        "try:\n    f()\nexcept Exception as error:\n    raise TrainingError() from error",
        "OUT = 'work/demo'",
    ],
)
def test_allowed_construct_is_not_reported(text: str) -> None:
    assert _forbidden("src/xded/x.py", text) == []


def test_torch_load_is_allowed_in_one_file() -> None:
    assert _forbidden(TORCH_LOAD_IN, "torch.load(path, weights_only=True)") == []
    assert _forbidden(TORCH_LOAD_IN, "torch.load(path)") != []


def test_long_function_is_seen() -> None:
    tree = ast.parse("class A:\n    def f(self):\n" + "        x = 1\n" * FUNCTION_LINES)
    assert list(_function_lengths("a.py", tree)) == [("a.py::A.f", FUNCTION_LINES + 1)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _function_lengths(name: str, tree: ast.AST, inside: str = "") -> Iterator[tuple[str, int]]:
    """Every function, methods and nested ones included, with its lines from `def` to the end."""
    for node in ast.iter_child_nodes(tree):
        scope = inside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = f"{inside}.{node.name}" if inside else node.name
            if not isinstance(node, ast.ClassDef):
                yield f"{name}::{scope}", (node.end_lineno or node.lineno) - node.lineno + 1
        yield from _function_lengths(name, node, scope)


def _forbidden(name: str, text: str) -> list[str]:
    """What the rules forbid in a source file, one line each."""
    found = [(node, reason) for node in ast.walk(ast.parse(text)) if (reason := _reason(name, node))]
    findings = [f"{name}:{getattr(node, 'lineno', 0)}: {reason}" for node, reason in found]
    for number, line in enumerate(text.splitlines(), 1):
        findings += [f"{name}:{number}: a path outside the repository" for _ in OUTSIDE.findall(line)]
    return findings


def _reason(name: str, node: ast.AST) -> str | None:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return _import_reason(node)
    if isinstance(node, ast.Call):
        return _call_reason(name, node)
    if isinstance(node, ast.ExceptHandler) and _catches_everything(node) and all(map(_does_nothing, node.body)):
        return "swallows every error"
    return None


def _import_reason(node: ast.Import | ast.ImportFrom) -> str | None:
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    names = [alias.name for alias in node.names]
    relative = isinstance(node, ast.ImportFrom) and node.level > 0
    for imported in [] if relative else [f"{module}.{name}" for name in names] if module else names:
        if f"{imported}.".startswith(tuple(f"{forbidden}." for forbidden in FORBIDDEN_IMPORTS)):
            return f"imports {imported}"
    if module in ("torch", "yaml") and "load" in names:
        return f"hides {module}.load behind another name"
    return None


def _call_reason(name: str, node: ast.Call) -> str | None:
    called = ast.unparse(node.func)
    if called in FORBIDDEN_CALLS and (called, name) != IMPORT_OF_EXTRAS:
        return f"{called}() {FORBIDDEN_CALLS[called]}"
    safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    if called == "torch.load" and not (safe and name == TORCH_LOAD_IN):
        return f"torch.load() belongs in {TORCH_LOAD_IN}, with weights_only=True"
    if any(word.arg == "weights_only" for word in node.keywords) and not safe:
        return "weights_only is not True"
    return None


def _catches_everything(node: ast.ExceptHandler) -> bool:
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def _does_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass | ast.Continue) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
