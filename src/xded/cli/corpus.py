"""`xded corpus`: import, export, describe, check, synthesise, simulate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xded.errors import EXIT_FINDINGS, XdedError

if TYPE_CHECKING:
    from xded.corpus.checks import Candidate, Report, Row

ROWS_SHOWN = 10


class ExportFormat(StrEnum):
    """Toolkits whose files `xded corpus export` writes."""

    NEMO = "nemo"
    KALDI = "kaldi"
    SPEECHBRAIN = "speechbrain"
    LHOTSE = "lhotse"
    DATASETS = "datasets"


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    help="Import, export, describe, check, synthesise or simulate a corpus.\n\n"
    "Example: xded corpus import fsdd data/fsdd --out corpora/fsdd",
)
importer = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(
    importer,
    name="import",
    help="Check every recording of a corpus once and write a manifest that points to the files (audio is not copied, "
    "except from Arrow and Parquet files). "
    "Exit code 3 when files were rejected; check.jsonl names each.\n\n"
    "Example: xded corpus import fsdd data/fsdd --out corpora/fsdd",
)

Out = Annotated[Path, typer.Option(help="Folder for manifest.jsonl and check.jsonl.")]
Controls = Annotated[str, typer.Option(help="Control speakers, separated by commas.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a manifest that is already there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Root = Annotated[
    Path | None, typer.Option(help="Where relative paths start; default: the list's own folder.", show_default=False)
]
CorpusPath = Annotated[Path, typer.Argument(help="Manifest, or the folder that holds manifest.jsonl.")]


@importer.command("uaspeech")
def import_uaspeech(
    source: Annotated[Path, typer.Argument(help="UASpeech folder, with 'audio' in it.")],
    out: Out,
    wordlist: Annotated[Path | None, typer.Option(help="speaker_wordlist.xls, when it lies elsewhere.")] = None,
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import UASpeech: <speaker>/<speaker>_<block>_<word>_<mic>.wav; CF* and CM* are controls.

    Example: xded corpus import uaspeech /data/UASpeech --out corpora/uaspeech
    """
    from xded.corpus import uaspeech

    _import(uaspeech.find(_absolute(source), wordlist), source, out, controls, overwrite, as_json)


@importer.command("fsdd")
def import_fsdd(
    source: Annotated[Path, typer.Argument(help="Folder with {digit}_{speaker}_{index}.wav.")],
    out: Out,
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import the Free Spoken Digit Dataset (8 kHz; resampled when it is read).

    Example: xded corpus import fsdd data/fsdd --out corpora/fsdd
    """
    from xded.corpus import fsdd

    _import(fsdd.find(_absolute(source)), source, out, controls, overwrite, as_json)


@importer.command("nemo")
def import_nemo(
    source: Annotated[Path, typer.Argument(help="NeMo manifest (JSON lines).")],
    out: Out,
    speaker_key: Annotated[str, typer.Option(help="Key that names the speaker.")] = "speaker",
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a NeMo manifest; keys of our own (take, prompt, role, band ...) are kept where it has them.

    Example: xded corpus import nemo data/asc16/recordings.jsonl --out corpora/asc16 --controls 01,02,03,04,05,06
    """
    from xded.corpus import nemo_manifest

    _import(nemo_manifest.find(_absolute(source), speaker_key), source, out, controls, overwrite, as_json)


@importer.command("folders")
def import_folders(
    source: Annotated[Path, typer.Argument(help="Folder with one folder per speaker.")],
    out: Out,
    texts: Annotated[
        Path | None, typer.Option(help="Text of every prompt: JSON {prompt: text}, or JSON lines with prompt and text.")
    ] = None,
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import <speaker>/<word>_<take>.flac (or .wav) folders.

    Example: xded corpus import folders data/words --out corpora/words --controls anna,ben
    """
    from xded.corpus import speaker_folders

    _import(speaker_folders.find(_absolute(source), texts), source, out, controls, overwrite, as_json)


@importer.command("torgo")
def import_torgo(
    source: Annotated[Path, typer.Argument(help="Folder with F01, M01, FC01 ... (or F, FC, M, MC) in it.")],
    out: Out,
    sentences: Annotated[bool, typer.Option("--sentences", help="Keep prompts of several words too.")] = False,
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import TORGO's isolated words, both microphones; FC* and MC* are controls. Other prompts are listed as rejected.

    Example: xded corpus import torgo data/TORGO --out corpora/torgo
    """
    from xded.corpus import torgo

    _import(torgo.find(_absolute(source), sentences), source, out, controls, overwrite, as_json)


@importer.command("kaldi")
def import_kaldi(
    source: Annotated[Path, typer.Argument(help="Folder with wav.scp, text and utt2spk.")],
    out: Out,
    root: Root = None,
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a Kaldi data folder. Commands in wav.scp are never run: such lines are rejected, and so are segments.

    Example: xded corpus import kaldi data/train --out corpora/words --controls anna,ben
    """
    from xded.corpus import kaldi

    _import(kaldi.find(_absolute(source), root), source, out, controls, overwrite, as_json)


@importer.command("speechbrain")
def import_speechbrain(
    source: Annotated[Path, typer.Argument(help="CSV with ID, duration, wav, spk_id, wrd in any order.")],
    out: Out,
    root: Annotated[
        Path | None,
        typer.Option(help="What $data_root stands for, and where relative paths start.", show_default=False),
    ] = None,
    speaker_key: Annotated[str, typer.Option(help="Column that names the speaker.")] = "spk_id",
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "wrd",
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a SpeechBrain CSV; columns take, prompt, role, band ... are kept where it has them.

    Example: xded corpus import speechbrain data/M08.csv --root data/audio --out corpora/M08
    """
    from xded.corpus import speechbrain_csv

    found = speechbrain_csv.find(_absolute(source), speaker_key, text_key, root)
    _import(found, source, out, controls, overwrite, as_json)


@importer.command("lhotse")
def import_lhotse(
    source: Annotated[Path, typer.Argument(help="Cut manifest: cuts.jsonl or cuts.jsonl.gz.")],
    out: Out,
    root: Root = None,
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a Lhotse cut manifest whose cuts are whole files of one channel; others are listed as rejected.

    Example: xded corpus import lhotse data/cuts.jsonl.gz --out corpora/words
    """
    from xded.corpus import lhotse

    _import(lhotse.find(_absolute(source), root), source, out, controls, overwrite, as_json)


@importer.command("datasets")
def import_datasets(
    source: Annotated[Path, typer.Argument(help="Folder of save_to_disk, of Parquet files, or an audiofolder.")],
    out: Out,
    speaker_key: Annotated[str, typer.Option(help="Column that names the speaker.")] = "speaker",
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    controls: Controls = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a Hugging Face data set; audio in Arrow or Parquet is written to OUT/audio (needs the extra 'arrow').

    Example: xded corpus import datasets data/words --text-key sentence --speaker-key client_id --out corpora/words
    """
    from xded.corpus import hugging_face_dataset
    from xded.corpus.checks import refuse_existing

    if not overwrite:
        refuse_existing(out)
    found = hugging_face_dataset.find(_absolute(source), _absolute(out), speaker_key, text_key)
    _import(found, source, out, controls, overwrite, as_json)


@app.command("export")
def export_corpus(
    corpus: CorpusPath,
    to: Annotated[ExportFormat, typer.Option("--format", help="Whose files to write.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the files.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files.")] = False,
    as_json: Json = False,
) -> None:
    """Write a corpus for another toolkit. Audio stays where it is; only 'datasets' copies it into its folder.

    Example: xded corpus export corpora/words --format kaldi --out data/words
    """
    from xded.corpus.exporting import write
    from xded.corpus.manifest import read_corpus

    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise XdedError(f"{out} holds files already.", "Choose another folder with --out, or add --overwrite.")
    read = read_corpus(corpus)
    files = write(read, to.value, out)
    if as_json:
        _print_json({"files": [str(file) for file in files], "recordings": len(read.recordings)})
    else:
        typer.echo(f"{len(read.recordings)} recordings of {len(read.speakers)} speakers in {out}:")
        typer.echo(f"  {', '.join(file.name for file in files)}")


@app.command("describe")
def describe_corpus(corpus: CorpusPath, as_json: Json = False) -> None:
    """Who, how many takes and prompts, hours, sample rates, bands, what is missing.

    Example: xded corpus describe corpora/uaspeech --json
    """
    from xded.corpus.describe import describe, render
    from xded.corpus.manifest import read_corpus

    description = describe(read_corpus(corpus))
    if as_json:
        _print_json(description)
    else:
        from rich.console import Console

        Console(highlight=False, markup=False).print(render(description), soft_wrap=True)


@app.command("check")
def check_recordings(corpus: CorpusPath, as_json: Json = False) -> None:
    """Check every recording of a corpus again, SHA-256 included; nothing is written. Exit code 3 on rejects.

    Example: xded corpus check corpora/fsdd
    """
    from xded.corpus.checks import check_corpus
    from xded.corpus.manifest import read_corpus

    read = read_corpus(corpus)
    _report(check_corpus(read), str(read.path), as_json)


@app.command("synthesise")
def synthesise_corpus(
    out: Annotated[Path, typer.Option(help="Folder for the audio and manifest.jsonl.")],
    controls: Annotated[int, typer.Option(min=0, help="Control speakers.")] = 6,
    targets: Annotated[int, typer.Option(min=0, help="Target speakers, severities spread as in UASpeech.")] = 9,
    words: Annotated[int, typer.Option(min=2, help="Words of the prompt list.")] = 30,
    takes: Annotated[int, typer.Option(min=1, help="Takes of each word by each speaker.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make the embedded corpus with the built-in synthesiser: made-up speakers, for trying things out.

    Example: xded corpus synthesise --out corpora/embedded
    """
    from xded.corpus.checks import refuse_existing
    from xded.corpus.synthetic import make_embedded_corpus

    if not overwrite:
        refuse_existing(out)
    manifest = make_embedded_corpus(out, controls=controls, targets=targets, words=words, takes=takes, seed=seed)
    _made(manifest, as_json)


@app.command("simulate")
def simulate_dysarthria(
    corpus: CorpusPath,
    out: Annotated[Path, typer.Option(help="Folder for the new audio and manifest.jsonl.")],
    severity: Annotated[
        str,
        typer.Option(help="0 to 1 for all target speakers, or SPEAKER=0.6,SPEAKER=0.2; none: spread as in UASpeech."),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copy a corpus with simulated dysarthria (a stand-in with a dial, not validated against listeners).

    Example: xded corpus simulate corpora/asc16 --out corpora/asc16-dysarthric --severity 07=0.8,08=0.3
    """
    from xded.corpus.checks import refuse_existing
    from xded.corpus.dysarthria import simulate_corpus
    from xded.corpus.manifest import read_corpus

    if not overwrite:
        refuse_existing(out)
    read = read_corpus(corpus)
    targets = [speaker for speaker in read.speakers if read.role_of(speaker) == "target"]
    _made(simulate_corpus(read, out, _severities(severity, targets), seed=seed), as_json)


def _severities(given: str, targets: list[str]) -> dict[str, float] | None:
    """Severity per speaker from the option's text; None when nothing is given."""
    if not given.strip():
        return None
    try:
        if "=" not in given:
            return dict.fromkeys(targets, float(given))
        pairs = [part.rsplit("=", 1) for part in given.split(",")]
        return {speaker.strip(): float(value) for speaker, value in pairs}
    except ValueError as error:
        raise XdedError(
            f"--severity '{given}' is neither a number nor SPEAKER=NUMBER,...",
            "Write --severity 0.6 or --severity M01=0.9,M05=0.3.",
        ) from error


def _made(manifest: Path, as_json: bool) -> None:
    """Says what a command has written."""
    from xded.corpus.manifest import read_corpus

    made = read_corpus(manifest)
    facts = {"manifest": str(manifest), "recordings": len(made.recordings), "speakers": len(made.speakers)}
    if as_json:
        _print_json(facts)
    else:
        typer.echo(f"{manifest}: {facts['recordings']} recordings of {facts['speakers']} speakers.")


def _import(
    found: tuple[list[Candidate], list[Row]], source: Path, out: Path, controls: str, overwrite: bool, as_json: bool
) -> None:
    """Checks what an importer found, writes manifest and report, and prints a summary."""
    from xded.corpus.checks import check, refuse_existing, store, with_controls

    if not overwrite:
        refuse_existing(out)
    candidates, rows = found
    typer.echo(f"Checking {len(candidates):,} recordings ...", err=True)
    names = [name.strip() for name in controls.split(",") if name.strip()]
    report = check(with_controls(candidates, names, str(source)), rows)
    _report(report, str(store(report, out, overwrite=overwrite)), as_json)


def _report(report: Report, manifest: str, as_json: bool) -> None:
    """Prints what a check found; exit code 3 when anything was rejected."""
    rows = [{**vars(row), "audio_filepath": str(row.audio_filepath)} for row in report.rows]
    if as_json:
        _print_json({"manifest": manifest, **report.summary(), "rows": rows})
    else:
        counts = [
            f"{len(found)} {status}" + (f" ({_kinds(report.summary()[key])})" if found else "")
            for status, key, found in (
                ("rejected", "rejected", report.rejected),
                ("with a warning", "warnings", report.warnings),
            )
        ]
        typer.echo(f"{manifest}: {len(report.kept)} recordings are good, {', '.join(counts)}.")
        for row in rows[:ROWS_SHOWN]:
            typer.echo(f"  {row['status']}: {row['reason']} {row['remedy']}")
        if len(rows) > ROWS_SHOWN:
            typer.echo(f"  and {len(rows) - ROWS_SHOWN} more (an import writes all of them to check.jsonl)")
    if report.rejected:
        raise typer.Exit(EXIT_FINDINGS)


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def _print_json(data: object) -> None:
    import json

    typer.echo(json.dumps(data, ensure_ascii=False, indent=1))


def _absolute(path: Path) -> Path:
    from xded.corpus.manifest import absolute

    return absolute(path)
