"""The model card: who was heard, who it was tested on and how sure that is, and what the model is not for.

Everything in it is read from the checkpoint and its run folder; what is not on record is said to be unknown. Ids of
speakers are left out unless they are asked for: that somebody is in a corpus of dysarthric speech is health data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from xded.corpus.manifest import BANDS, Recording, read_corpus
from xded.doctor.run_folder import RunFolder, looks_like_run, read_run
from xded.errors import XdedError
from xded.exported import Description
from xded.findings import CHECKS, SEVERITIES
from xded.models.recogniser import Recogniser
from xded.scoring import NO_VALUE, Scores, Summary, read_predictions
from xded.training.run import FINDINGS

TEMPLATE = "model_card.md"
HIDDEN = "(speaker)"
SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")  # what Markdown or HTML would read as markup
BEST = "best.pt"
Row = tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What the template shows; texts are plain, and rows hold what their table's head says.

    Attributes:
        name, parameters, checkpoint: of the model; versions: of the packages that it was trained with.
        heard: what, how many of that kind, speakers, takes.
        people: role, band, speakers, takes, recordings, hours; people_problem: why there are none.
        wra, statement, warnings: of the scores; tested: speaker and band (first all), takes, WRA, WER, CER, empty;
            bands: the same by band; test_problem: why there are none.
        findings: severity and what should have held; findings_said: counts, or why there are none.
        data_licence: as given.
    """

    name: str
    epoch: int
    parameters: str
    versions: str
    stages: tuple[str, ...]
    heard: tuple[Row, ...]
    people: tuple[Row, ...] = ()
    people_problem: str = ""
    wra: str = ""
    statement: str = ""
    warnings: tuple[str, ...] = ()
    tested: tuple[Row, ...] = ()
    bands: tuple[Row, ...] = ()
    test_problem: str = ""
    findings: tuple[Row, ...] = ()
    findings_said: str = ""
    data_licence: str | None = None


@dataclass
class _Sources:
    """The run folder that a checkpoint lies in, and the recordings of its corpus, where they can be read."""

    run: RunFolder | None
    recordings: tuple[Recording, ...] = ()
    corpus_problem: str = ""
    speakers: set[str] = field(default_factory=set)  # every id that a text may hold


def hide(text: str, speakers: Iterable[str]) -> str:
    """A text without speakers' ids, also where they are a part of a file's or a recording's name (M08_ctc_logits.pt).

    Texts that hold numbers are not to be given: a speaker may be called 12.
    """
    for speaker in sorted(speakers, key=len, reverse=True):
        text = re.sub(rf"(?<![^\W_]){re.escape(speaker)}(?![^\W_])", HIDDEN, text)
    return text


def read_card(recogniser: Recogniser, name_speakers: bool, data_licence: str | None) -> Card:
    """Everything that is on record about a recogniser."""
    sources = _sources(recogniser)
    status = (sources.run.status if sources.run else None) or {}
    tested = _test(recogniser, sources, name_speakers)
    hidden = () if name_speakers else sources.speakers
    return Card(
        name=hide(recogniser.name, hidden),
        epoch=recogniser.epoch,
        parameters=_parameters(recogniser, status),
        versions=_versions(sources.run),
        stages=tuple(_stage(stage) for stage in status.get("stages") or ()),
        heard=_heard(recogniser, hidden),
        data_licence=data_licence,
        **_people(recogniser, sources),
        **_findings(sources.run),
        **tested,
    )


def render(card: Card, description: Description, apart: float | None) -> str:
    """The card as Markdown.

    Args:
        card: of `read_card`.
        description: of the folder.
        apart: largest difference between onnxruntime and torch; none without ONNX graphs.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown: `plain` and `table` escape
    )
    environment.filters |= {"plain": plain, "table": table}
    return environment.get_template(TEMPLATE).render(card=card, description=description, apart=apart)


def plain(text: str) -> str:
    """A text that no reader of Markdown takes for anything else."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(rows: Iterable[Row], *head: str) -> str:
    """Rows below the names of their columns."""
    lines = [head, ("---",) * len(head), *(tuple(map(plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _sources(recogniser: Recogniser) -> _Sources:
    folder = recogniser.path.parent
    config = recogniser.config
    sources = _Sources(read_run(folder) if looks_like_run(folder) else None)
    sources.speakers = {speaker for p in recogniser.provenance for speaker in p.speakers}
    sources.speakers |= {*config.fold.held_out, *config.fold.exclude}
    if config.corpus is None:
        sources.corpus_problem = "the checkpoint names no corpus"
        return sources
    try:
        sources.recordings = read_corpus(config.corpus).recordings
    except (XdedError, OSError):
        sources.corpus_problem = "the corpus is not where the run found it"
    sources.speakers |= {r.speaker for r in sources.recordings}
    return sources


def _parameters(recogniser: Recogniser, status: Mapping[str, Any]) -> str:
    counts = recogniser.student.parameter_counts()
    trained = status.get("parameters")
    if not isinstance(trained, Mapping) or "trainable" not in trained:
        return f"{counts['total']:,} parameters; how many of them were trained is not on record"
    moved = int(trained["trainable"])
    return f"{counts['total']:,} parameters, {counts['total'] - moved:,} frozen and {moved:,} trained in the last stage"


def _stage(stage: Mapping[str, Any]) -> str:
    frozen = ", encoder frozen" if stage.get("freeze_encoder") else ""
    return f"{stage.get('epochs')} epochs, peak learning rate {stage.get('peak_lr')}{frozen}"


def _kept(run: RunFolder | None, name: str) -> Mapping[str, Any] | None:
    """A JSON file of the run; none when there is none or it cannot be read."""
    try:
        kept = json.loads((run.path / name).read_text(encoding="utf-8")) if run else None
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, Mapping) else None


def _versions(run: RunFolder | None) -> str:
    """Packages that the run was trained with."""
    packages = (_kept(run, "env.json") or {}).get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _heard(recogniser: Recogniser, hidden: Iterable[str]) -> tuple[Row, ...]:
    """What each artefact has heard; those that differ only in the speaker's id are one row."""
    rows: dict[str, list[Any]] = {}
    for p in recogniser.provenance:
        rows.setdefault(hide(p.what, hidden), []).append(p)
    table = []
    for what, found in rows.items():
        speakers, takes = ({name for p in found for name in getattr(p, key)} for key in ("speakers", "takes"))
        known = all(p.known for p in found)
        counts = (str(len(speakers)), str(len(takes))) if known else ("not on record", "not on record")
        table.append((what, str(len(found)), *counts))
    return tuple(table)


def _people(recogniser: Recogniser, sources: _Sources) -> dict[str, Any]:
    """Roles and bands of everyone who was heard, and how long: from the corpus."""
    takes = {take for p in recogniser.provenance for take in p.takes}
    heard = [r for r in sources.recordings if r.take in takes]
    problem = sources.corpus_problem
    if sources.recordings and len({r.take for r in heard}) < len(takes):
        missing = len(takes) - len({r.take for r in heard})
        problem = f"{missing:,} of {len(takes):,} takes are not in the corpus of the run"
    groups: dict[tuple[str, str], list[Recording]] = {}
    for recording in heard:
        groups.setdefault((recording.role, recording.band or NO_VALUE), []).append(recording)
    order = {band: str(number) for number, band in enumerate(BANDS)}
    rows = [
        (
            role,
            band.replace("_", " "),
            str(len({r.speaker for r in of})),
            f"{len({r.take for r in of}):,}",
            f"{len(of):,}",
            f"{sum(r.duration for r in of) / 3600:.2f}",
        )
        for (role, band), of in sorted(groups.items(), key=lambda group: (group[0][0], order.get(group[0][1], "9")))
    ]
    return {"people": tuple(rows), "people_problem": problem}


def _findings(run: RunFolder | None) -> dict[str, Any]:
    """What the checks of the run found: titles only, because their words may name people and paths."""
    kept = _kept(run, FINDINGS)
    if kept is None:
        return {"findings_said": "No findings can be read beside this checkpoint: whether it is sound is not known."}
    found = sorted(kept.get("findings", ()), key=lambda finding: SEVERITIES.index(finding["severity"]))
    rows = []
    for finding in found:
        check = finding["check"]
        overruled = " (overruled)" if check in kept.get("forced", ()) else ""
        rows.append((finding["severity"], (CHECKS[check].title if check in CHECKS else check) + overruled))
    passed = f"{len(kept.get('passed', ()))} checks passed before the first step"
    said = f"{len(rows) or 'No'} finding{'' if len(rows) == 1 else 's'}, {passed}. They do not say how well it learned."
    return {"findings": tuple(rows), "findings_said": said}


def _test(recogniser: Recogniser, sources: _Sources, name_speakers: bool) -> dict[str, Any]:
    """The scores of the run folder, or why there are none."""
    run = sources.run
    path = run.path / "scores.json" if run else None
    if run is None or path is None or not path.is_file():
        return {"test_problem": "No scores are kept beside this checkpoint."}
    if recogniser.path.name != BEST:
        return {"test_problem": f"The scores beside this checkpoint are those of {BEST}."}
    scores = Scores.from_json(path.read_text(encoding="utf-8"), str(path))
    sources.speakers |= scores.by_speaker.keys()
    if not name_speakers:
        said = {key: hide(value, sources.speakers) for key, value in scores.conditions.items()}
        scores = replace(scores, conditions=said)
    bands = {p.speaker: p.band for p in read_predictions(run.predictions)} if run.predictions else {}
    rows = [("all", "", *_numbers(scores.overall))]
    for number, (speaker, summary) in enumerate(scores.by_speaker.items(), start=1):
        band = (bands.get(speaker) or NO_VALUE).replace("_", " ")
        rows.append((speaker if name_speakers else f"speaker {number}", band, *_numbers(summary)))
    return {
        "wra": str(scores.overall.wra_percent),
        "statement": scores.statement,
        "warnings": tuple(_warnings(scores)),
        "tested": tuple(rows),
        "bands": tuple((band.replace("_", " "), *_numbers(s)) for band, s in scores.by_band.items()),
    }


def _numbers(summary: Summary) -> Row:
    return (
        f"{summary.takes:,}",
        *(str(estimate) for estimate in (summary.wra_percent, summary.wer_percent, summary.cer_percent)),
        str(summary.empty_percent),
    )


def _warnings(scores: Scores) -> Iterable[str]:
    """What a reader of the numbers must not overlook."""
    said = {"seen": "were", "mixed": "were partly", "unknown": "may have been"}
    for key, what in (("speakers", "speakers"), ("words", "words")):
        if (state := scores.conditions[key]) in said:
            yield f"The tested {what} {said[state]} heard in training: others will be recognised worse."
    if scores.conditions["word_list"] == "closed":
        yield "Only words of a list could come out: without the list, recognition is worse."
    if len(scores.by_speaker) == 1:
        yield "One speaker was tested: nothing is known of how others will fare."
    if len(scores.seeds) == 1:
        yield "One seed was trained: another one may differ by several points."
