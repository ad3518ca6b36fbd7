"""`xded report`: the page of a study that is done, half done or suspect, read by a parser and by a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import platform
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tiny_corpus import MODEL, write_corpus
from xded.audio import read_audio
from xded.cli.report import report
from xded.doctor.inspection import curves_of
from xded.errors import ConfigError
from xded.findings import Finding
from xded.report.study import StudyReport, finish, report_of
from xded.report.study_evidence import Learning, learning_of
from xded.report.study_figures import learning_drawing
from xded.report.study_page import render
from xded.report.study_tables import gap_pairs
from xded.study.folder import LOCK, STATE
from xded.study.outcome import Result
from xded.study.plan import Study, StudyError, build
from xded.study.run import Outcome, read_study, run_study
from xded.study.steps import Cell

PARTS = [
    *("verdict", "tables", "learning", "speakers", "teachers", "confusions", "attention", "worst", "versions", "cost"),
]
HOSTILE = 'held out <script>alert("x")</script> & more'
TRAIN = {"batch_size": 8, "threads": 1, "device": "cpu", "validate_every_epochs": 1}
VOID_TAGS = ("meta", "img", "br")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def study_of(corpus: Path) -> Study:
    """Two folds, two seeds, three attempts of a few updates."""
    stages = [{"epochs": 1, "peak_lr": 1e-3}, {"epochs": 1, "peak_lr": 2e-3}]
    teach = {**TRAIN, "stages": stages[:1]}
    return build(
        {
            "name": "tiny", "question": "Is <this> broken?", "corpus": str(corpus), "held_out": ["t1", "t2"],
            "seeds": [0, 1], "updates": 12,
            "config": {
                "model": MODEL, "train": {**TRAIN, "stages": stages},
                "teach": {"parent_on": "controls", "parent": teach, "teacher": teach},
            },
            "attempts": {
                HOSTILE: {"expected": 43.2},
                "included": {"include_held_out": True},
                "CTC-KD": {"set": {"objective.ctc_kd": 1.0}},
            },
            "hypotheses": {
                "domain shift": {"attempt": "included", "above": 60},
                "gap": {"attempt": "included", "minus": HOSTILE, "above": 5},
            },
            "ladder": {"attempt": "included", "rungs": [{"above": 0, "says": "broken"}]},
            "next": [{"when": {"domain shift": "rejected"}, "do": "Look for it.", "command": "xded doctor {run}"}],
        },
        "the test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("study")
    corpus = write_corpus(folder / "corpus", controls=("c1", "c2"), targets=("t1", "t2", "t3"))
    outcome = run_study(study_of(corpus.path), folder / "out")
    assert outcome.complete
    return outcome, folder / "out"


@pytest.fixture(scope="module")
def found(done: tuple[Outcome, Path]) -> StudyReport:
    return finish(*done, "tiny.yaml")


@pytest.fixture
def copied(found: StudyReport, tmp_path: Path) -> Path:
    return Path(shutil.copytree(found.out, tmp_path / "copy"))


class Page(HTMLParser):
    """What a reader of the page gets; a tag that is closed out of turn fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.open = html, [""]
        self.tags: list[tuple[str, dict[str, str], str]] = []
        self.text: list[tuple[str, str]] = []  # innermost tag, text
        self.feed(html)
        assert self.open == [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}, self.open[-1]))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}, self.open[-1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.tags if name == tag]

    def section(self, name: str) -> Page:
        start = self.html.index(f'<section aria-labelledby="{name}">')
        return Page(self.html[start : self.html.index("</section>", start) + len("</section>")])

    def says(self) -> str:
        return " ".join(text for _, text in self.text)


@pytest.fixture(scope="module")
def page(found: StudyReport) -> Page:
    return Page((found.out / "report.html").read_text(encoding="utf-8"))


# --- the whole page ---------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(page: Page, found: StudyReport) -> None:
    assert len(page.html) < 1_000_000
    assert re.findall(r"https?:|//\w+\.\w+/|<script|<link|@import|url\((?!#)|xmlns", page.html) == []
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "media-src" not in policy
    for tag, attributes, _ in page.tags:
        address = attributes.get("src") or attributes.get("xlink:href") or attributes.get("href") or "#"
        assert address.startswith(("data:image/png;base64,", "#")) or tag == "a", (tag, address[:80])
    assert not page.all("audio")
    assert "report.html" in found.text()


def test_parts_stand_in_order_and_headings_skip_no_level(page: Page) -> None:
    assert [section["aria-labelledby"] for section in page.all("section")] == PARTS
    assert [h["id"] for h in page.all("h2")] == PARTS
    assert {f"#{part}" for part in PARTS} == {a["href"] for a in page.all("a") if a["href"].startswith("#")}
    levels = [int(tag[1]) for tag, _, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_tables_can_be_read_aloud(page: Page) -> None:
    tables, captions = page.all("table"), [attributes for tag, attributes, inside in page.tags if tag == "caption"]
    assert len(tables) == len(captions) >= 15
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert all(inside in ("div", "figure") for tag, _, inside in page.tags if tag == "table")


def test_pictures_say_their_numbers(page: Page) -> None:
    pictures = page.all("svg")
    assert len(pictures) >= 3 + 3 + 1 + 3 + 1  # curves, speakers, hypotheses, attention, a spectrogram
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(re.findall(r"\d", picture["aria-label"])) >= 4, picture["aria-label"]
    used = set(re.findall(r"(?:href=\"#|url\(#)([^)\"]+)", page.html)) - set(PARTS)
    assert used <= {attributes.get("id") for _, attributes, _ in page.tags}


def test_hostile_texts_are_shown_as_texts(page: Page) -> None:
    assert not page.all("script")
    assert HOSTILE in page.section("learning").says()
    assert any(HOSTILE in picture["aria-label"] for picture in page.all("svg"))
    assert "Is <this> broken?" in page.says()


# --- what it says -----------------------------------------------------------------------------------------


def test_verdict_and_command_stand_on_top(page: Page, found: StudyReport) -> None:
    said = page.section("verdict").says()
    for answer in found.answers:
        assert f"{answer.hypothesis}: {answer.verdict} {answer.because}" in said
    assert found.ladder in said
    assert f"What to do next Look for it. {found.command}" in said
    assert found.command.startswith("xded doctor /")
    assert "What is not done" not in said


def test_every_number_of_an_attempt_leads_to_its_run(page: Page, found: StudyReport) -> None:
    links = [a["href"] for a in page.section("tables").all("a")]
    reached = {(found.out / link).resolve() for link in links}
    wanted = {run for r in found.outcome.results if r.source != "derived" for run in r.runs}
    assert reached == wanted
    assert all(path.is_dir() for path in reached)


def test_links_hold_from_where_the_page_lies(found: StudyReport, tmp_path: Path) -> None:
    run = found.outcome.work.cells[0].run
    shutil.copy(found.out / "report.html", run / "report.html")
    elsewhere = tmp_path / "a b" / "page.html"
    try:
        links = [a["href"] for a in Page(render(found, elsewhere)).section("tables").all("a")]
    finally:
        (run / "report.html").unlink()
    assert os.path.relpath(run / "report.html", elsewhere.parent) in links


def test_pictures_and_tables_show_the_same_numbers(page: Page, found: StudyReport) -> None:
    for table in found.tables:
        assert all(row[0] in page.section("tables").says() for row in table.main.rows)
        for name in found.outcome.study.attempts:
            heard = " (heard)" if name == "included" else ""
            [alt] = [p["aria-label"] for p in page.all("svg")
                     if p["aria-label"].startswith(f"WRA of {name}{heard} by speaker")]  # fmt: skip
            for speaker, summary in table.scores[name].by_speaker.items():
                assert re.search(rf"{speaker}: [^;]*{re.escape(str(summary.wra_percent))} % \({table.decode}\)", alt)


def test_teachers_are_shown_on_speakers_that_they_do_not_know(page: Page, found: StudyReport) -> None:
    cells = [text for tag, text in page.section("teachers").text if tag == "td"]
    [scores] = [t.scores for t in found.tables if t.decode == "open"]
    mean = [scores[f"teacher {t}"].by_speaker for t in ("t1", "t2", "t3")]
    wanted = [[f"{of[s].wra_percent.value:.0f}" if s in of else "-" for s in ("t1", "t2")] for of in mean]
    assert [cells[0:2], cells[3:5], cells[6:8]] == wanted
    assert wanted[0][0] == wanted[1][1] == "-"


def test_stages_are_marked_in_the_learning_curves(page: Page, found: StudyReport) -> None:
    curves = page.section("learning")
    assert [text for tag, text in curves.text if tag == "text"].count("stage 2") == 3
    [learning, *_] = learning_of(found.outcome)
    rows = [json.loads(line) for line in (learning.cells[0].run / "metrics.jsonl").read_text().splitlines()]
    first = [row["update"] for row in rows if row["event"] == "step" and row["stage"] == 1]
    assert f"stage 2 begins after update {max(first)}" in curves.all("svg")[0]["aria-label"]
    assert "4 runs (2 folds, 2 seeds)" in curves.all("svg")[0]["aria-label"]


def test_expected_reported_and_recomputed_have_columns_of_their_own(found: StudyReport) -> None:
    outcome = found.outcome
    [mine] = [r for r in outcome.results if r.system == "included" and r.held_out == ("t1",)]
    foreign = Result("from elsewhere", "imported", ("t1",), mine.predictions, mine.runs[:1], 98.76)
    mixed = dataclasses.replace(outcome, results=(*outcome.results, foreign))
    [claims] = [t for t in report_of(mixed, found.out, "x").all_tables() if t.title.startswith("Expected")]
    assert claims.columns[2:4] == ("expected WRA %", "reported WRA %")
    assert all(column.startswith("recomputed") for column in claims.columns[4:])
    by_name = {row[0]: row[1:4] for row in claims.rows}
    assert by_name == {HOSTILE: ("all", "43.2", "-"), "from elsewhere": ("t1", "-", "98.76")}
    for table in found.all_tables():
        assert table.title.startswith("Expected") or "43.2" not in str(table.rows)


def test_the_gap_is_between_attempts_that_differ_in_nothing_else(found: StudyReport) -> None:
    assert gap_pairs(found.outcome.study) == [("included", HOSTILE)]
    gaps = found.tables[0].gaps
    assert gaps is not None
    assert gaps.columns[-2:] == ("t1", "t2")


def test_a_suspect_evaluation_stands_before_everything(found: StudyReport) -> None:
    finding = Finding("token-offset", "refuse", "run 1", "Ids are off by one.", "WRA is void.", "Shift them.")
    suspect = dataclasses.replace(found, suspicions=(finding,))
    said = Page(render(suspect, found.out / "x.html")).section("verdict").says()
    assert said.startswith("Verdict The evaluation is suspect.")
    assert said.index("Ids are off by one.") < said.index("domain shift")


def test_commands_versions_and_the_study_file_are_there(page: Page, found: StudyReport) -> None:
    said = page.section("versions").says()
    env = json.loads((found.outcome.work.cells[0].run / "env.json").read_text())
    for what in (env["packages"]["torch"], env["python"], "include_held_out: true", f"xded report {found.out}"):
        assert what in said


# --- recordings -------------------------------------------------------------------------------------------


def test_the_worst_recordings_are_those_that_nobody_got_right(page: Page, found: StudyReport) -> None:
    right: dict[str, list[bool]] = {}
    for result in found.outcome.results:
        if result.source == "attempt":
            for p in result.of("open"):
                right.setdefault(p.recording, []).append(p.hypothesis == p.reference)
    worst = page.section("worst")
    shown = re.findall(r"(t\d_[A-Z]+_\d), \d", worst.says())
    least = sorted(float(np.mean(r)) for r in right.values())[: len(shown)]
    assert [float(np.mean(right[name])) for name in shown] == least
    assert len(shown) == 5


def test_sound_is_in_the_page_only_when_asked_for(found: StudyReport, tmp_path: Path) -> None:
    report(found.out, output=tmp_path / "loud.html", embed_audio=True)
    loud = Page((tmp_path / "loud.html").read_text(encoding="utf-8"))
    assert any("media-src data:" in meta.get("content", "") for meta in loud.all("meta"))
    first = loud.all("audio")[0]
    head, _, data = first["src"].partition(",")
    assert head == "data:audio/flac;base64"
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
    [recording] = [r for r in found.outcome.corpus.recordings if r.recording == first["aria-label"]]
    assert rate == 16_000
    np.testing.assert_allclose(waveform, read_audio(recording.audio_filepath), atol=1e-4)


# --- studies that are not done ----------------------------------------------------------------------------


def break_off(folder: Path) -> list[str]:
    """Makes a study of a copied folder look as if it was stopped; returns what is not done."""
    state = json.loads((folder / STATE).read_text())
    attempts = [piece for piece in state["pieces"] if piece["kind"] == "attempt"]
    for piece, what in zip(attempts[-2:], ("failed", "running"), strict=True):
        piece["state"] = what
        next(folder.glob(f"pieces/*/{Path(piece['folder']).name}/done.json")).unlink()
    attempts[-2]["error"] = "loss is not finite"
    (folder / STATE).write_text(json.dumps({**state, "state": "running"}))
    return [piece["title"] for piece in attempts[-2:]]


def test_a_killed_study_shows_what_is_there(copied: Path) -> None:
    failed, broken = break_off(copied)
    report(copied)
    html = (copied / "report.html").read_text(encoding="utf-8")
    page, said = Page(html), Page(html).section("verdict").says()
    assert "tiny: not finished, and nobody works on it" in page.says()
    assert "1 failed:" in said
    assert f"{failed}: loss is not finite" in said
    assert f"1 waiting: {broken}" in said
    assert read_study(copied).progress.count("done") == len(read_study(copied).work.steps) - 2
    assert page.section("tables").all("table")


def test_a_running_study_is_said_to_run(copied: Path) -> None:
    [_, running] = break_off(copied)
    owner = subprocess.Popen(["sleep", "60"])
    try:
        (copied / LOCK).write_text(json.dumps({"pid": owner.pid, "host": platform.node()}))
        outcome = read_study(copied)
    finally:
        owner.kill()
        owner.wait()
    assert outcome.state == "running"
    html = render(report_of(outcome, copied, "x"), copied / "x.html")
    assert "It is still running" in html
    assert f"1 running: {running}" in Page(html).section("verdict").says()


def test_a_study_without_any_result_has_a_page(copied: Path) -> None:
    for mark in copied.rglob("done.json"):
        mark.unlink()
    for metrics in copied.rglob("metrics.jsonl"):
        metrics.unlink()
    (copied / STATE).write_text(json.dumps({**json.loads((copied / STATE).read_text()), "pieces": []}))
    report(copied)
    said = Page((copied / "report.html").read_text(encoding="utf-8")).says()
    for nothing in ("No attempt has results yet", "No run has logged anything yet", "No teacher has been tested yet"):
        assert nothing in said


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(copied: Path, found: StudyReport) -> None:
    for checkpoint in copied.glob("pieces/runs/*/best.pt"):
        checkpoint.write_bytes(b"damaged")
    next(copied.glob("pieces/runs/*/env.json")).write_text("{")
    report(copied)
    page = Page((copied / "report.html").read_text(encoding="utf-8"))
    said = page.section("verdict").says()
    assert "What could not be read" in said
    assert "Attention of 'included'" in said
    assert "env.json cannot be read" in said
    assert page.section("worst").all("svg")


def test_a_folder_that_is_no_longer_its_study_is_refused(copied: Path) -> None:
    text = (copied / "study.yaml").read_text()
    (copied / "study.yaml").write_text(text.replace("width: 16", "width: 8"))
    with pytest.raises(StudyError, match=r"finished pieces, such as '.*', are not those of its study\.yaml"):
        report(copied)
    (copied / "study.yaml").write_text(text)
    (copied / STATE).write_text("{")
    with pytest.raises(StudyError, match=r"state\.json cannot be read"):
        report(copied)


def test_what_is_neither_study_nor_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a study \(study\.yaml\) nor a run"):
        report(tmp_path)
    with pytest.raises(ConfigError, match="is a folder"):
        report(tmp_path, output=tmp_path)


def test_a_run_gets_its_own_page(found: StudyReport, tmp_path: Path) -> None:
    run = found.outcome.work.cells[0].run
    report(run, output=tmp_path / "run.html")
    page = Page((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert page.section("training").all("img")
    assert "xded inspect" in page.section("recordings").says()
    with pytest.raises(ConfigError, match="shows no recordings by itself"):
        report(run, embed_audio=True)


def test_pictures_of_many_long_runs_stay_small() -> None:
    rows = [{"event": "step", "update": u, "loss": 5.0 / u, "stage": 1} for u in range(1, 4000)]
    rows += [{"event": "epoch", "epoch": u, "update": 10 * u, "wra": 0.5} for u in range(1, 400)]
    curves = curves_of(rows, None)
    cells = tuple(Cell("a", (f"t{n}",), 0, "", Path()) for n in range(60))
    drawing = learning_drawing(Learning("a", cells, (curves,) * 60), "many")
    assert len(drawing.svg) < 25_000


# --- in a browser -----------------------------------------------------------------------------------------


def open_in_chromium(path: Path, home: Path) -> tuple[Page, set[str]]:
    """A page as Chromium builds it, and every address that the page asked for; no name is resolved."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: the page is checked by the parser only")
    log = home / "net.json"
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--window-size=1280,2000"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", f"--user-data-dir={home / 'profile'}"),
    ]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, timeout=120, check=True)
    requests = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    # what the browser asks for on its own account (updates, the time of day) has no origin
    asked = {r["url"] for r in requests if "url" in r and r.get("initiator", "not an origin") != "not an origin"}
    return Page(done.stdout.decode()), asked


@pytest.fixture(scope="module")
def opened(found: StudyReport, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, set[str]]:
    return open_in_chromium(found.out / "report.html", tmp_path_factory.mktemp("chromium"))


def test_a_browser_shows_all_parts(opened: tuple[Page, set[str]], page: Page) -> None:
    shown, _ = opened
    for tag in ("h1", "h2", "h3", "table", "caption", "figure", "svg", "section", "td"):
        assert len(shown.all(tag)) == len(page.all(tag)), tag
    assert [h["id"] for h in shown.all("h2")] == PARTS


def test_a_browser_fetches_nothing(opened: tuple[Page, set[str]]) -> None:
    assert opened[1] == set()


@pytest.mark.slow
def test_a_page_that_fetches_is_noticed(found: StudyReport, tmp_path: Path) -> None:
    html = (found.out / "report.html").read_text(encoding="utf-8")
    fetching = html.replace("</main>", '<img src="http://fetched.invalid/x.png" alt=""></main>')
    for name, text in (("open", fetching.replace("Content-Security-Policy", "nothing")), ("closed", fetching)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        _, asked = open_in_chromium(tmp_path / f"{name}.html", tmp_path / name)
        assert asked == ({"http://fetched.invalid/x.png"} if name == "open" else set())  # the policy forbids it


def test_energy_is_summed_where_it_is_known_and_said_to_be_unknown_elsewhere(found: StudyReport) -> None:
    def with_joules(joules: dict[str, float]) -> StudyReport:
        progress = dataclasses.replace(found.outcome.progress, joules=joules)
        return dataclasses.replace(found, outcome=dataclasses.replace(found.outcome, progress=progress))

    attempts = [cell.key for cell in found.outcome.work.cells]
    none = with_joules({})
    assert none.cost().endswith("Energy not known on this machine (no readable counter).")
    assert "Energy not known on this machine" in (html := render(none, found.out / "report.html"))
    assert '<th scope="col">Wh' not in html
    known = with_joules(dict.fromkeys(attempts, 7200.0))
    count, done = len(attempts), found.outcome.progress.count("done")
    assert f"Energy {2 * count:.1f} Wh, of {count} of {done} pieces: of whole processor packages" in known.cost()
    text = re.sub(r"<[^>]+>", " ", render(known, found.out / "report.html"))
    assert "shared out by CPU time" in text
    (row,) = re.findall(r"attempt\s+12\s+12\s+[\d.]+\s+[\d.]+\s+([\d.]+)", text)
    assert float(row) == 2 * count


def test_what_sharing_saved_is_counted_in_pieces_and_in_minutes(found: StudyReport) -> None:
    work = found.outcome.work
    seconds = {step.key: 60.0 for step in work.steps}
    progress = dataclasses.replace(found.outcome.progress, seconds=seconds)
    same = dataclasses.replace(found, outcome=dataclasses.replace(found.outcome, progress=progress))
    assert work.single_runs > len(work.steps)
    assert (
        f"all pieces together took {len(work.steps):.1f} minutes. {len(work.steps)} pieces did the work of "
        f"{work.single_runs}, which would have taken {work.single_runs:.1f} minutes."
    ) in same.cost()
