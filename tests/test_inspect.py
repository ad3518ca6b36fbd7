"""`xded inspect`: what a model makes of a recording, the run's curves, and the page that shows both."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from tiny_corpus import job_for, write_corpus
from xded.cli.inspect import file_name, inspect
from xded.config import load, override
from xded.corpus.manifest import Corpus
from xded.doctor.inspection import (
    Attention,
    Inspected,
    curves_of,
    find_recordings,
    inspect_recording,
    open_teaching,
    rate_error,
)
from xded.doctor.run_folder import read_run
from xded.errors import CheckpointError, ConfigError, CorpusError
from xded.models.cross_attention import cross_attention
from xded.models.recogniser import Recogniser, load_recogniser
from xded.models.student import decoder_input
from xded.report.run_page import render
from xded.targets.aggregate import top_k
from xded.targets.store import Entry, Index, StoreWriter, audio_hash
from xded.training.data import compute_features
from xded.training.run import fit

RECORDING = "t1_BAD_0"
EPOCHS = 6
CURVES = {"loss.png", "learning_rate.png", "gradients.png", "validation.png"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stages = [{"epochs": EPOCHS, "peak_lr": 3e-3}]
    out = tmp_path_factory.mktemp("inspect") / "run"
    job = job_for(corpus, out, train={"stages": stages})
    job.config = override(job.config, {"corpus": corpus.path})
    fit(job, quiet=True)
    return out


@pytest.fixture(scope="module")
def recogniser(run: Path) -> Recogniser:
    return load_recogniser(run)


@pytest.fixture(scope="module")
def heard(recogniser: Recogniser, corpus: Corpus) -> Inspected:
    [recording] = find_recordings(corpus, [RECORDING])
    return inspect_recording(recogniser, recording, open_teaching(recogniser, None))


def write_targets(
    folder: Path, recogniser: Recogniser, corpus: Corpus, spikes: Mapping[str, Mapping[int, str]], **fields: Any
) -> Path:
    """Posteriors of teachers (and "target") about RECORDING: blank but for a piece at some frames."""
    [recording] = find_recordings(corpus, [RECORDING])
    pieces, frames = recogniser.tokenizer.pieces, recogniser.student.encoded_frames(torch.tensor(16 * 400))
    for who, said in spikes.items():
        probabilities = np.full((int(frames), len(pieces)), 0.02)
        probabilities[:, recogniser.tokenizer.blank] = 1.0
        for frame, piece in said.items():
            probabilities[frame, [0, pieces.index(piece)]] = 0.02, 1.0
        probabilities /= probabilities.sum(1, keepdims=True)
        known = {
            "kind": "ctc", "temperature": 2.0, "top_k": 4, "vocabulary": len(pieces), "frame_rate_hz": 25.0,
            "teacher_forced": False, "tokenizer": recogniser.tokenizer.fingerprint, "teachers": (who,),
            "teacher_hashes": {}, "provenance": (), **fields,
        }  # fmt: skip
        place = folder / "ctc" if who == "target" else folder / "posteriors" / who / "ctc"
        writer = StoreWriter(place, Index(**known))
        entry = Entry(recording=RECORDING, audio_sha256=audio_hash(recording), steps=int(frames))
        writer.add(entry, top_k(probabilities.astype(np.float32), 4, np.zeros(int(frames), np.float32)))
        writer.close()
    return folder


class Page(HTMLParser):
    """A page's tags and images; a tag that is closed out of turn fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- one recording --------------------------------------------------------------------------------------


def test_attention_is_that_of_the_true_text_as_the_decoder_reads_it(
    recogniser: Recogniser, heard: Inspected, corpus: Corpus
) -> None:
    tokenizer, first = recogniser.tokenizer, heard.attention[0]
    features = torch.from_numpy(compute_features(heard.recording.audio_filepath, recogniser.student.front_end))[None]
    written = torch.tensor([[*tokenizer.encode("BAD"), tokenizer.eos]])
    lengths = torch.tensor([features.shape[1]])
    wanted = cross_attention(recogniser.student, features, lengths, decoder_input(written, tokenizer.bos))
    assert (first.what, first.pieces) == ("true text", ("B", "A", "D", "</s>"))
    np.testing.assert_allclose(first.weights, wanted.mean(1), atol=1e-6)
    np.testing.assert_allclose(first.weights.sum(2), 1.0, atol=1e-5)


def test_free_running_attention_is_shown_when_the_output_is_another(heard: Inspected) -> None:
    assert heard.decoder_text != "BAD"  # a few updates are not enough
    assert [attention.what for attention in heard.attention] == ["true text", "free-running output"]
    assert "".join(heard.attention[1].pieces[:-1]) == heard.decoder_text


def test_attention_numbers_say_where_and_how_often_it_moves_on() -> None:
    weights = np.zeros((1, 4, 5))
    weights[0, [0, 1, 2, 3], [0, 2, 1, 4]] = 1.0
    numbers = Attention("true text", ("A", "B", "C", "</s>"), weights, 0.04).numbers()
    assert numbers["layers"] == [{"from_s": 0.0, "to_s": 0.16, "steps_forward": 2, "steps": 3}]


def test_ctc_panel_reads_what_decoding_reads(heard: Inspected) -> None:
    [student] = heard.ctc
    assert (student.who, student.temperature, student.text) == ("student", 1.0, heard.ctc_text)
    np.testing.assert_allclose(student.probabilities.sum(1), 1.0)


def test_teachers_stand_beside_the_student_at_their_temperature(
    recogniser: Recogniser, corpus: Corpus, tmp_path: Path
) -> None:
    spikes = {"target": {2: "B"}, "t2": {2: "B", 5: "A"}, "t1": {3: "B", 5: "A", 6: "A", 8: "D"}}
    folder = write_targets(tmp_path, recogniser, corpus, spikes)
    [recording] = find_recordings(corpus, [RECORDING])
    panels = inspect_recording(recogniser, recording, open_teaching(recogniser, folder)).ctc
    named = [(panel.who, panel.temperature) for panel in panels]
    assert named == [("student", 1.0), ("student", 2.0), ("target", 2.0), ("teacher t1", 2.0), ("teacher t2", 2.0)]
    assert [panel.text for panel in panels[2:]] == ["B", "BAD", "BA"]
    assert [(s.piece, round(s.time_s, 3)) for s in panels[3].spikes] == [("B", 0.12), ("A", 0.2), ("D", 0.32)]
    one, two = (panel.probabilities for panel in panels[:2])
    np.testing.assert_allclose(np.sqrt(one) / np.sqrt(one).sum(1, keepdims=True), two, atol=1e-9)  # T = 2 of T = 1


def test_what_cannot_be_shown_of_the_teachers_is_said(recogniser: Recogniser, corpus: Corpus, tmp_path: Path) -> None:
    folder = write_targets(tmp_path, recogniser, corpus, {"target": {2: "B"}, "t1": {2: "B"}, "t2": {2: "B"}})
    write_targets(folder, recogniser, corpus, {"t3": {2: "B"}}, tokenizer="f" * 64)
    (folder / "posteriors" / "t1" / "ctc" / "index.json").write_text("{")
    (folder / "posteriors" / "t2" / "ctc" / "shard_000.safetensors").write_bytes(b"")
    [recording, other] = find_recordings(corpus, [RECORDING, "t2_AB_1"])
    teaching = open_teaching(recogniser, folder)
    shown = inspect_recording(recogniser, recording, teaching)
    assert {panel.who for panel in shown.ctc} == {"student", "target"}
    notes = " ".join(shown.notes)
    for said in ("t1/ctc/index.json is damaged", "t2/ctc/shard_000", "another tokenizer: teacher t3"):
        assert said in notes
    changed = recording.model_copy(update={"audio_sha256": "b" * 64})
    assert any("other audio" in note for note in inspect_recording(recogniser, changed, teaching).notes)
    assert not any("other audio" in note for note in shown.notes)
    silent = inspect_recording(recogniser, other, teaching)
    assert {panel.who for panel in silent.ctc} == {"student"}
    assert any(note.startswith("target, teacher t2 say nothing") for note in silent.notes)


def test_a_run_without_targets_shows_the_student_and_says_so(heard: Inspected) -> None:
    assert "The run has no targets: only the student is shown." in heard.notes


def test_whether_the_take_was_heard_is_said(recogniser: Recogniser, heard: Inspected, corpus: Corpus) -> None:
    assert heard.notes[0].startswith("This take was heard by: ")
    assert "student" in heard.notes[0]
    strange = heard.recording.model_copy(update={"take": "new", "speaker": "t9"})
    teaching = open_teaching(recogniser, None)
    assert "not heard either" in inspect_recording(recogniser, strange, teaching).notes[0]


@pytest.mark.parametrize(
    ("weights", "head"),
    [({"ctc": 0.0}, "CTC head (ctc, ctc_kd, word_kd and text_kd have no"), ({"cross_entropy": 0.0}, "decoder (")],
)
def test_an_untrained_head_is_named(
    recogniser: Recogniser, corpus: Corpus, weights: dict[str, float], head: str
) -> None:
    config = override(recogniser.config, {f"objective.{part}": weight for part, weight in weights.items()})
    untrained = dataclasses.replace(recogniser, config=config)
    notes = inspect_recording(untrained, corpus.recordings[0], open_teaching(untrained, None)).notes
    [note] = [note for note in notes if "did not train" in note]
    assert note.startswith(f"This run did not train the {head}")


# --- a run's curves -------------------------------------------------------------------------------------


def test_curves_hold_what_the_run_logged(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = curves_of(rows, load(run / "config.yaml"))
    steps = [row for row in rows if row["event"] == "step"]
    gradients = [row for row in rows if row["event"] == "gradients"]
    assert curves.update.tolist() == [row["update"] for row in steps]
    assert curves.step["lr"].tolist() == [row["lr"] for row in steps]
    assert curves.parts == ("ctc", "cross_entropy")
    assert curves.groups[:3] == ("subsampling", "encoder.0", "ctc_head")
    assert curves.groups[-1] == "decoder_head"
    assert curves.norms[-1, 1] == gradients[-1]["norms"]["encoder.0"]
    validated = [row["wra"] for row in rows if "wra" in row]
    assert curves.numbers()["wra"]["last"] == pytest.approx(validated[-1], rel=1e-3)
    assert rate_error(curves) == 0.0


def test_a_rate_that_is_not_the_planned_one_is_measured(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    steps[-1]["lr"] *= 1.25
    assert rate_error(curves_of(steps, load(run / "config.yaml"))) == pytest.approx(0.25)


def test_curves_of_an_older_run_have_no_gradients_by_layer_and_no_plan() -> None:
    curves = curves_of([{"event": "step", "update": 1, "loss": 2.0}, {"event": "gradients"}], None)
    assert (curves.groups, curves.planned, rate_error(curves)) == ((), None, None)
    assert curves.numbers()["loss"] == {"first": 2.0, "last": 2.0, "least": 2.0, "most": 2.0}


# --- the command and the page ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `xded inspect --json` says of two recordings, one of them named twice."""
    out = tmp_path_factory.mktemp("told")
    with redirect_stdout(io.StringIO()) as text:
        inspect(run, [RECORDING, "t2_CAB_1", RECORDING], out=out, as_json=True)
    return dict(json.loads(text.getvalue()))


def test_pictures_and_page_are_written_and_say_the_same_numbers(told: dict[str, Any]) -> None:
    names = {f"{name}_{kind}.png" for name in (RECORDING, "t2_CAB_1") for kind in ("attention", "ctc")}
    assert {Path(path).name for path in told["pictures"]} == CURVES | names
    for path in told["pictures"]:
        pixels = imread(path)
        assert pixels.shape[0] >= 300
        assert pixels.shape[1] >= 1200
        assert pixels[..., :3].std() > 0.03, path
    html = Path(told["report"]).read_text(encoding="utf-8")
    page = Page(html)
    alts = [str(image["alt"]) for image in page.all("img")]
    assert len(alts) == len(told["pictures"])
    first = told["recordings"][0]
    [attention] = [alt for alt in alts if alt.startswith("Cross-attention") and RECORDING in alt]
    for layer in first["attention"][0]["layers"]:
        assert f"looks at {layer['from_s']:.2f} s first, at {layer['to_s']:.2f} s last" in attention
    [ctc] = [alt for alt in alts if alt.startswith("CTC posteriors") and RECORDING in alt]
    blank = f"mean blank {first['ctc'][0]['blank']:.2f}"
    assert f"student at T = 1 reads {first['ctc_output'] or '(nothing)'} (" in ctc
    assert blank in ctc
    loss = told["training"]["loss"]
    assert any(f"from {loss['first']:.4g} to {loss['last']:.4g}" in alt for alt in alts)


def test_the_page_needs_nothing_else_and_can_be_read_aloud(told: dict[str, Any]) -> None:
    html = Path(told["report"]).read_text(encoding="utf-8")
    assert re.findall(r"https?:|//\w+\.\w+/|<script|<link|@import|url\(", html) == []
    page = Page(html)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(len(str(image["alt"])) > 40 for image in page.all("img"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert (len(page.all("h1")), len(page.all("main")), page.all("html")[0]["lang"]) == (1, 1, "en")
    titles = {str(section["aria-labelledby"]) for section in page.all("section")}
    assert {"findings", "data", "training", "recordings", "scores"} <= titles
    assert "prefers-color-scheme: dark" in html


def test_the_page_lies_in_the_run_and_an_old_one_is_replaced(run: Path) -> None:
    (run / "report.html").write_text("old")
    inspect(run, [RECORDING])
    assert "old" not in (run / "report.html").read_text(encoding="utf-8")[:200]
    assert list(run.glob("*.tmp")) == []
    assert (run / "figures" / "gradients.png").is_file()


def test_hostile_texts_are_shown_as_texts(heard: Inspected, run: Path, tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>\"><img src=x onerror=y>"
    folder = read_run(run)
    folder.path, folder.status = tmp_path, {"name": attack, "state": "finished", "message": attack}
    folder.data = {"train": {"meant": {attack: 3}, "heard": {attack: 2}, "files": 2, "strangers": 0}}
    finding = {"check": attack, "severity": "warn", **dict.fromkeys(("subject", "what", "effect", "remedy"), attack)}
    (tmp_path / "findings.json").write_text(json.dumps([finding]))
    recording = heard.recording.model_copy(update={"recording": attack, "text": attack, "speaker": attack})
    hostile = dataclasses.replace(heard, recording=recording, ctc_text=attack, notes=(attack,))
    html = render(folder, curves_of([], None), [], [(hostile, [])])
    page = Page(html)
    assert not page.all("script")
    assert not page.all("img")
    assert html.count("&lt;script&gt;") >= 10


def test_findings_and_scores_of_the_run_are_on_the_page(run: Path, heard: Inspected, tmp_path: Path) -> None:
    folder = read_run(run)
    folder.path = tmp_path
    found = {"check": "token-offset", "severity": "refuse", "what": "WRA 0.0 %, 20.6 % with ids shifted by 1."}
    (tmp_path / "findings.json").write_text(json.dumps({"findings": [found], "passed": [{}, {}], "unchecked": []}))
    (tmp_path / "scores.json").write_text("{}")
    folder.scores = {}
    html = render(folder, curves_of([], None), [], [(heard, [])])
    for said in ("refuse: token-offset", "20.6 % with ids shifted", "1 finding kept in the run, 2 checks passed"):
        assert said in html
    assert "scores.json holds no scores" in html
    (tmp_path / "findings.json").write_text("[1]")
    assert "findings.json holds no findings" in render(folder, curves_of([], None), [], [])


def test_recording_ids_become_file_names_that_stay_apart() -> None:
    assert file_name("M08_B2_CW1.5-M5") == "M08_B2_CW1.5-M5"
    names = {file_name(recording) for recording in ("../a/b", "../a_b", ".._a_b", "a" * 300, "a" * 301)}
    assert len(names) == 5
    assert all(re.fullmatch(r"[\w.-]{1,100}", name) for name in names)


def test_an_unknown_recording_is_refused_with_the_nearest(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no recording 't1_BAD_9'.*'t1_BAD_"):
        inspect(run, ["t1_BAD_9"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_no_checkpoint_or_no_targets_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        inspect(run / "best.pt", [RECORDING])
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        inspect(run, [RECORDING], checkpoint="worst.pt")
    with pytest.raises(ConfigError, match="holds no CTC posteriors"):
        inspect(run, [RECORDING], targets=tmp_path)


def test_half_a_run_folder_is_shown_as_far_as_it_goes(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "best.pt").write_bytes((run / "best.pt").read_bytes())
    (half / "metrics.jsonl").write_text('{"event": "step", "update": 1, "loss": 2.0}\n{"event": "st')
    inspect(half, [RECORDING])
    html = (half / "report.html").read_text(encoding="utf-8")
    for said in ("config.yaml is missing", "status.json is missing", "of 2 lines cannot be read"):
        assert said in html
    assert (half / "figures" / f"{RECORDING}_ctc.png").is_file()
    assert (half / "figures" / "loss.png").is_file()
