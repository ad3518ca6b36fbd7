"""Bad input on the command line: an exit code, one paragraph with value, place and remedy, and nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cli_calls import Called, call, contents, done, refused
from tiny_corpus import MODEL, write_corpus

FULL = Path("/dev/full")  # every write to it fails as on a full disk
STAGE = {"stages": [{"epochs": 1, "peak_lr": 1e-3}], "threads": 1, "device": "cpu"}
CONFIG = {"model": MODEL, "train": STAGE, "teach": {"parent": STAGE, "teacher": STAGE}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, teachers, targets and a run of the fold without t1, and a config: nothing below may change them."""
    made = tmp_path_factory.mktemp("made")
    write_corpus(made / "corpus", controls=("c1",), targets=("t1", "t2", "t3"))
    (made / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    fold = ("--corpus", made / "corpus", "--held-out", "t1", "--config", made / "tiny.yaml")
    done("teach", *fold, "--out", made / "teachers", "--jobs", 1)
    done("targets", *fold, "--teachers", made / "teachers", "--out", made / "targets", "--jobs", 1)
    done("train", *fold, "--targets", made / "targets", "--ctc-kd", 1, "--out", made / "run")
    return made


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with links to what is made; `out` below it is free."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(here: Path, command: str) -> Called:
    """A call by its command line; files of `made` must be the same afterwards, and nothing that looks whole is new."""
    before = contents(here.joinpath("run").resolve().parent)
    called = call(*command.split())
    assert contents(here.joinpath("run").resolve().parent) == before
    finished = ("manifest.jsonl", "best.pt", "index.json", "scores.json", "predictions.jsonl", "report.md")
    assert [path for name in finished for path in here.glob(f"out/**/{name}")] == []
    return called


CORPUS = "--corpus corpus"
TINY = "--corpus corpus --config tiny.yaml --out out"
REFUSED = {
    "corpus missing": ("teach --corpus nowhere --out out", "nowhere: no manifest can be read", "xded corpus import"),
    "corpus empty": ("teach --corpus empty --out out", "manifest.jsonl holds no recordings", "xded corpus import"),
    "corpus not given": ("teach --out out", "No corpus was given", "Give --corpus DIR"),
    "no --out": ("train --corpus corpus", "No run folder was given", "Give --out DIR"),
    "unknown speaker": (f"train {TINY} --held-out T1x", "'T1x' (did you mean 't1'?)", "xded corpus describe"),
    "unknown speaker to exclude": (f"targets {TINY} --teachers teachers --exclude t9", "'t9' (did you mean 't"),
    "unknown speaker to test": ("evaluate run --held-out t99", "no speaker 't99'", "Its speakers are c1, t1, t2, t3"),
    "fold without teachers": (
        f"teach {TINY} --held-out t1 --held-out t2 --held-out t3",
        "The fold without t1, t2, t3 has no target speaker left to be a teacher",
        "Hold out or exclude fewer speakers",
    ),
    "fold without finished teachers": (
        f"targets {TINY} --held-out t2 --held-out t3 --teachers teachers",
        "has no finished teacher for this fold",
        "xded teach",
    ),
    "fold too small for the demo": (
        f"demo {TINY} --fold-size 3",
        "folds of 3 leave none to be a teacher",
        "--fold-size 1",
    ),
    "nobody left": (f"train {TINY} --held-out t1 --held-out t2 --held-out t3 --exclude c1", "no speaker to train on"),
    "word that the tokenizer cannot write": (
        "train --corpus accents --config tiny.yaml --out out --tokenizer teachers/tokenizer.model",
        "cannot write 1 of 4 texts: 'DÄ' (<unk> for Ä)",
        "without --tokenizer one is trained",
    ),
    "text too long for its audio": (
        "train --corpus hasty --config tiny.yaml --out out",
        "1 recordings are too short for CTC to write their text: c1_AB_0 ('AB AB AB",
        "--ctc 0",
    ),
    "unknown key in a file": (
        "train --corpus corpus --out out --config unknown.yaml",
        "unknown.yaml: unknown key 'train.batchsize' (did you mean 'batch_size'?)",
        "xded train --help-config",
    ),
    "unknown key of --set": (f"train {TINY} --set train.peak_lr=1", "unknown key 'train.peak_lr'", "--help-config"),
    "--set without =": (f"train {TINY} --set train.batch_size", "--set train.batch_size: no '='", "section.key=value"),
    "--set into a list": (f"train {TINY} --set train.stages.0.epochs=3", "'stages' is a value, not a section"),
    "--set with half a list": (f"train {TINY} --set train.stages=[1", "'[1' is not valid YAML", "section.key=value"),
    "YAML without a mapping": (
        "train --out out --config list.yaml",
        "list.yaml holds no mapping of sections",
        "config.yaml",
    ),
    "damaged YAML": ("train --out out --config damaged.yaml", "damaged.yaml is not valid YAML", "Mend the line"),
    "config missing": ("train --out out --config no.yaml", "no.yaml: no such config file", "--config"),
    "tokenizer missing": (
        f"teach {TINY} --tokenizer no.model",
        "no.model: the tokenizer cannot be read",
        "--tokenizer",
    ),
    "file that is no tokenizer": (
        f"teach {TINY} --tokenizer tiny.yaml",
        "tiny.yaml is no list of pieces",
        ".model",
    ),
    "checkpoint of another tokenizer": (
        f"train {TINY} --init run --tokenizer other.model",
        "run/best.pt was trained with another tokenizer (fingerprint ",
        "leave out --tokenizer",
    ),
    "another tokenizer to evaluate": (
        "evaluate run --tokenizer other.model",
        "other.model is not the tokenizer of run/best.pt",
        "the checkpoint carries its own",
    ),
    "targets of another tokenizer": (
        f"train {TINY} --held-out t1 --targets targets --ctc-kd 1 --tokenizer other.model",
        "targets/ctc was made with another tokenizer",
        "make the targets anew",
    ),
    "--max-length too short": (
        "evaluate run --decode decoder --max-length 2",
        "Prompt 'CAB' has 3 tokens but max_length is 2: 2 of 4 prompts",
        "Use --max-length 3 or more",
    ),
    "targets of another fold": (
        f"train {TINY} --held-out t2 --targets targets --ctc-kd 1",
        "teacher t2 has heard held-out speaker t2",
        "parent has heard held-out speaker t2",
        "xded teach, xded targets",
    ),
    "parent of another fold": (
        f"train {TINY} --held-out t2 --init teachers/parent",
        "parent has heard held-out",
        "xded teach",
    ),
    "targets of another temperature": (
        f"train {TINY} --held-out t1 --targets targets --ctc-kd 1 --temperature 3",
        "targets/ctc was made at temperature 2; the objective says 3",
        "--temperature 3",
    ),
    "no targets for KD": (f"train {TINY} --ctc-kd 1", "uses KD but no targets are given", "'xded targets'"),
    "damaged checkpoint": ("evaluate damaged.pt", "damaged.pt cannot be read as a checkpoint", "xded status RUN"),
    "checkpoint that does not match its hash": (
        "evaluate flipped",
        "best.pt is damaged: its SHA-256",
        "xded status RUN",
    ),
    "checkpoint missing": ("transcribe nowhere corpus/t1_AB_0.wav", "nowhere: no such checkpoint", "xded status"),
    "run folder that is taken": (
        "train --corpus corpus --config tiny.yaml --out run",
        "run already holds a run",
        "--resume, or choose another --out",
    ),
    "run of another config": (
        "train --resume --out run --batch-size 2",
        "run was started with another config: train.batch_size was 8, now 2",
        "run/config.yaml",
    ),
    "no run": ("status corpus", "corpus holds no run", "--out"),
    "corpus folder that is taken": ("corpus synthesise --out corpus", "corpus already holds a corpus", "--overwrite"),
    "unknown head": (
        "evaluate run --decode decodr",
        "decode.mode: Input should be 'ctc' or 'decoder' (given: 'decodr')",
    ),
    "unknown head to transcribe": ("transcribe run corpus/t1_AB_0.wav --decode x", "decode.mode", "(given: 'x')"),
    "word list missing": (
        "transcribe run x.wav --word-list no.txt",
        "--word-list no.txt cannot be read",
        "a word a line",
    ),
    "word list empty": ("transcribe run x.wav --word-list empty.txt", "empty.txt holds no words", "each line"),
    "word list with strange letters": (
        "transcribe run x.wav --word-list strange.txt",
        "cannot write 1 of 1 texts: 'XYZ'",
    ),
    "device that is not there": (
        f"train {TINY} --device quantum",
        "device 'quantum' cannot be used here",
        "--device cpu",
    ),
}


def prepare(here: Path) -> None:
    """The bad files that the cases name."""
    (here / "empty").mkdir()
    (here / "empty" / "manifest.jsonl").touch()
    manifest = (here / "corpus" / "manifest.jsonl").read_text()
    corpus = str((here / "corpus").resolve())
    rows = [json.loads(line) for line in manifest.splitlines()]
    for name, text in (("accents", "DÄ"), ("hasty", "AB " * 20)):
        changed = {"accents": "DA", "hasty": "AB"}[name]
        (here / name).mkdir()
        lines = [
            row
            | {"audio_filepath": f"{corpus}/{row['audio_filepath']}"}
            | ({"text": text.strip()} if row["text"] == changed and (name, row["take"][-1]) != ("hasty", "1") else {})
            for row in rows
            if name == "accents" or row["speaker"] == "c1" or row["text"] != changed
        ]
        (here / name / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (here / "unknown.yaml").write_text("train: {batchsize: 3}\n")
    (here / "list.yaml").write_text("- train\n")
    (here / "damaged.yaml").write_text("train: [\n\n")
    (here / "damaged.pt").write_bytes((here / "run" / "best.pt").read_bytes()[:5000])
    (here / "flipped").mkdir()
    for name in ("best.pt", "best.pt.sha256"):
        shutil.copy(here / "run" / name, here / "flipped" / name)
    data = bytearray((here / "flipped" / "best.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (here / "flipped" / "best.pt").write_bytes(data)
    (here / "empty.txt").touch()
    (here / "strange.txt").write_text("XYZ\n")
    from xded.tokenizer import Tokenizer

    (here / "other.model").write_bytes(Tokenizer.train(["BAD CAB", "ABCD"], "bpe", 16, "upper").model_bytes)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_a_paragraph(here: Path, case: str) -> None:
    prepare(here)
    command, *fragments = REFUSED[case]
    refused(asked(here, command), 2, *fragments)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(here: Path) -> None:
    called = asked_to_fail(here, f"train {TINY} --held-out t1 --peak-lr 1e30 --epochs 5")
    assert called.code == 1
    paragraph = called.err.splitlines()[-1]
    assert paragraph.startswith("xded: ")
    assert "the loss is " in paragraph
    assert "t2_" in paragraph or "t3_" in paragraph or "c1_" in paragraph
    assert "state" in (here / "out" / "status.json").read_text()
    assert done("status", here / "out").out.startswith("# supervised: failed")


def asked_to_fail(here: Path, command: str) -> Called:
    before = contents(here.joinpath("run").resolve().parent)
    called = call(*command.split())
    assert contents(here.joinpath("run").resolve().parent) == before
    assert "Traceback" not in called.err
    return called


# what is written, by which command, as a path below OUT that cannot take a byte
WRITTEN = {
    "manifest": ("corpus import folders spoken --out out", "manifest.jsonl.part"),
    "report of an import": ("corpus import folders spoken --out out", "check.jsonl"),
    "audio": (
        "corpus synthesise --controls 0 --targets 1 --words 2 --takes 1 --out out",
        "audio/T01/zero_1.flac",
    ),
    "tokenizer": (f"train {TINY}", "tokenizer.model.tmp"),
    "config of a run": (f"train {TINY}", "config.yaml.tmp"),
    "log of a run": (f"train {TINY}", "metrics.jsonl"),
    "status of a run": (f"train {TINY}", "status.json.tmp"),
    "checkpoint": (f"train {TINY}", "best.pt.tmp"),
    "teacher": (f"teach {TINY} --held-out t1 --jobs 1", "parent/config.yaml.tmp"),
    "posteriors": (
        f"targets {TINY} --held-out t1 --teachers teachers --jobs 1",
        "posteriors/t2/ctc/shard_000.safetensors",
    ),
    "index of targets": (f"targets {TINY} --held-out t1 --teachers teachers --jobs 1", "decoder/index.json.tmp"),
    "predictions": ("evaluate run --output out/scores.json", "predictions.jsonl.part"),
    "scores": ("evaluate run --output out/s.json", "s.json.tmp"),
}


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("case", WRITTEN)
def test_full_disk_is_said_and_costs_nothing_but_the_piece(here: Path, case: str) -> None:
    command, blocked = WRITTEN[case]
    for word in ("yes", "no"):
        folder = here / "spoken" / "t1"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / "corpus" / f"t1_{'AB' if word == 'yes' else 'DA'}_0.wav", folder / f"{word}_1.wav")
    (here / "spoken" / "t1" / "bad_1.wav").write_text("no audio")
    path = here / "out" / blocked
    path.parent.mkdir(parents=True)
    path.symlink_to(FULL)
    called = asked_to_fail(here, command)
    assert called.code == 1, called.err
    paragraph = called.err.splitlines()[-1]
    assert paragraph.startswith("xded: ")
    assert "disk is full" in paragraph
    assert "out" in paragraph
    assert "ree some space" in paragraph
    final = path.with_name(path.name.removesuffix(".part").removesuffix(".tmp"))
    if final != path:
        assert not final.exists(), "half a file where a whole one is expected"
    path.unlink(missing_ok=True)
    if command.startswith("train") and any((here / "out").glob("*.pt")):
        command += " --resume"
    again = call(*command.split())  # with space again, the same command ends well; an import tells of the bad file
    assert again.code == (3 if "import" in command else 0), again.err


@pytest.mark.slow
def test_a_worker_hands_its_error_over_as_a_paragraph(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = (here / "corpus").resolve()
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(corpus / row["audio_filepath"])
        if row["prompt"] == "AB" and row["speaker"] in ("t2", "t3"):  # their teachers cannot write that; the parent can
            row["text"] = "AB " * 20
    (here / "hasty").mkdir()
    (here / "hasty" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "teach --corpus hasty --config tiny.yaml --parent-on controls --jobs 2 --out out"
    called = call(*words.split())
    elsewhere = capfd.readouterr()
    assert called.code == 2
    assert "recordings are too short for CTC to write their text: t" in called.err.splitlines()[-1]
    assert "Traceback" not in called.err + elsewhere.err + elsewhere.out
    assert (here / "out" / "teachers" / "t1" / "best.pt").is_file()  # what was under way was finished
