"""The command line as a whole: help, speed, exit codes, flags that messages and the README name."""

from __future__ import annotations

import ast
import errno
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli_calls import call, done, refused
from xded import cli
from xded.cli.options import resolved
from xded.config import PATHS, Config, load, override, to_yaml

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    *("demo", "corpus", "teach", "crosstest", "import-teachers", "targets", "train", "evaluate", "transcribe"),
    *("adapt", "average", "export", "tokenizer"),
    *("study", "doctor", "inspect", "report", "status"),
)
OF_OTHER_TOOLS = {
    *("--unk_id", "--bos_id", "--eos_id"),  # SentencePiece
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--no-python"),  # torchrun
    "--head",  # ray start
    "--local-dir",  # hf download
}
HEAVY = {"torch", "lightning", "numpy", "scipy", "soundfile", "sentencepiece", "rich.table"}


def command_of(words: list[str]) -> Any:
    """The command that words after `xded` lead to, and how many of the words that took."""
    command: Any = typer.main.get_command(cli.app)
    for depth, word in enumerate(words):
        if word not in getattr(command, "commands", {}):
            return command, depth
        command = command.commands[word]
    return command, len(words)


def flags_of(command: Any) -> set[str]:
    own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help"}, *(flags_of(below) for below in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example_that_could_be_run(verb: str) -> None:
    text = " ".join(done(verb, "--help").out.split())
    example = re.search(rf"Example: xded ({verb} .*?)(?= (?:Arguments|Options|Commands):)", text)
    assert example, text
    words = shlex.split(example[1])
    command, depth = command_of(words)
    assert {word for word in words[depth:] if word.startswith("--")} <= flags_of(command)


def test_help_names_every_verb_an_example_and_the_exit_codes() -> None:
    shown = done("--help").out
    assert re.findall(r"^  ([a-z]+)  ", shown[shown.index("Commands:") :], re.MULTILINE) != []
    for verb in VERBS:
        assert re.search(rf"^  {verb}  ", shown, re.MULTILINE)
    words = " ".join(shown.split())
    assert "Example: xded demo" in words
    for meaning in ("0 done", "1 something failed", "2 a wrong argument", "3 done, and problems", "130 interrupted"):
        assert meaning in words
    assert "..." not in shown.replace("[ARGS]...", ""), "a verb's description is cut off"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom xded.cli import app\n"
        "for words in ([], *([verb] for verb in sys.argv[2].split())):\n"
        "    try: app([*words, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print(*set(sys.argv[1].split()) & set(sys.modules), file=sys.stderr, end='')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, " ".join(HEAVY), " ".join(VERBS)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, ""), "imported for a help text: " + ran.stderr


def test_version_and_wrong_usage() -> None:
    assert done("--version").out == f"xded {version('xded')}\n"
    for words in (["evalute"], ["train", "--epoch"], ["transcribe"], ["corpus", "import", "kaldi"]):
        called = call(*words)
        assert called.code == 2
        assert "Traceback" not in called.err
        assert "--help' for help" in called.err


@pytest.mark.parametrize(
    "words",
    [["status"], ["evaluate"], ["transcribe"], ["teach"], ["targets"], ["corpus", "describe"], ["corpus", "check"]],
    ids=" ".join,
)
def test_json_where_something_is_read(words: list[str]) -> None:
    assert "--json" in flags_of(command_of(words)[0])


def test_messages_name_only_flags_that_exist() -> None:
    known = flags_of(command_of([])[0]) | OF_OTHER_TOOLS
    unknown = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                flags = re.findall(r"(?<![\w(-])--[a-z][\w-]*", node.value)
                unknown += [f"{path.name}:{node.lineno} {flag}" for flag in flags if flag not in known]
    assert unknown == []


def test_every_command_of_the_readme_could_be_run() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("xded ")]
    verbs = set()
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command, depth = command_of(words)
        assert depth > 0, line
        verbs.add(words[0])
        assert {word for word in words[depth:] if word.startswith("--")} <= flags_of(command), line
        required = {p.opts[0] for p in command.params if p.required and p.opts[0].startswith("--")}
        assert required <= set(words), line
    assert verbs == set(VERBS)


def test_config_can_be_listed_shown_and_read_back(tmp_path: Path) -> None:
    listed = done("train", "--help-config").out
    for key in ("corpus = ", "train.batch_size = 8", "objective.ctc_kd = 0.0", "teach.parent.stages = "):
        assert f"\n{key}" in f"\n{listed}"
    shown = done("train", "--show-config", "--ctc-kd", 1, "--set", "train.batch_size=3", "--epochs", 2).out
    (tmp_path / "config.yaml").write_text(shown, encoding="utf-8")
    config = load(tmp_path / "config.yaml")
    assert (config.objective.ctc_kd, config.train.batch_size, config.train.stages[-1].epochs) == (1.0, 3, 2)
    again = done("train", "--show-config", "--config", tmp_path / "config.yaml", "--batch-size", 4).out
    assert again == shown.replace("batch_size: 3\n", "batch_size: 4\n")  # a flag wins over the file
    assert to_yaml(Config()) == done("train", "--show-config").out


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "runs/a/x.pt"), 1, "runs/a/x.pt: the disk is full. Free some space"),
        (OSError(errno.ENOSPC, "No space left"), 1, "runs/b: the disk is full. Free some space and give the same"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 1, "/data: permission denied. Mend"),
        (KeyboardInterrupt(), 130, "interrupted. Give the same command again to go on: what is finished is kept."),
    ],
)
def test_what_the_system_refuses_is_said_in_a_paragraph(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def app() -> None:
        raise raised

    monkeypatch.setattr(cli, "app", app)
    refused(call("teach", "--out", "runs/b"), code, said)
    refused(call("teach", "--out=runs/b"), code, said)


def test_every_path_of_a_config_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = [(key, getattr(Config(), key).__class__.model_fields) for key in ("train", "tokenizer", "model")]
    every = [("", Config.model_fields), *((f"{section}.", known) for section, known in fields)]
    paths = {
        prefix + name for prefix, known in every for name, field in known.items() if "Path" in str(field.annotation)
    }
    assert {"corpus", "train.guide"} <= paths == set(PATHS)
    tree = resolved(override(Config(), dict.fromkeys(paths, "there/it")), fit=False)
    assert {key: attrgetter(key)(tree) for key in paths} == dict.fromkeys(paths, tmp_path / "there" / "it")
    assert str(resolved(override(Config(), {"model.pretrained": "hf:a/b"}), fit=False).model.pretrained) == "hf:a/b"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def app() -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(OSError, match="Bad file descriptor"):
        call("status")


def test_status_of_several_runs_is_a_line_each(tmp_path: Path) -> None:
    for name, state in (("parent", "finished"), ("teachers/M01", "failed")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        status = {"state": state, "name": name, "last_epoch": "epoch 2 done", "message": "disk" * (state == "failed")}
        (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert done("status", tmp_path).out == "parent: finished, epoch 2 done\nteachers/M01: failed, disk\n"
    assert set(json.loads(done("status", tmp_path, "--json").out)) == {"parent", "teachers/M01"}
