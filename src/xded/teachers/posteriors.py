"""What every teacher says about the training recordings, stored as top-k and aggregated once into targets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from xded.config import Config, Heard
from xded.corpus.folds import Fold, coverage, guard, key_of
from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError
from xded.models.checkpoints import load
from xded.models.recogniser import Recogniser, load_recogniser, provenance_of
from xded.models.student import decoder_input
from xded.parallel import run_all
from xded.targets.aggregate import combine, top_k, weigh
from xded.targets.store import Entry, Index, Kind, Posterior, Store, StoreWriter, TargetError, audio_hash, read_index
from xded.teachers.adapt import Teachers, parts_of
from xded.training.data import Batch, TrainingData
from xded.training.evaluation import batches

KINDS: tuple[Kind, ...] = ("ctc", "decoder")
LEAST_LOG_PROB = -100.0  # of a text that does not fit into its frames: JSON has no infinity


def _is_current(folder: Path, teacher_hash: str, recordings: Sequence[Recording], config: Config) -> bool:
    """Whether posteriors are there, of this teacher, these recordings and this temperature."""
    try:
        index = read_index(folder)
    except TargetError:  # missing, unfinished or damaged: it is made anew
        return False
    return (
        list(index.teacher_hashes.values()) == [teacher_hash]
        and index.temperature == config.objective.temperature
        and index.top_k == min(config.target.top_k, index.vocabulary)
        and [(e.recording, e.audio_sha256) for e in index.recordings]
        == [(r.recording, audio_hash(r)) for r in recordings]
    )


def extract(teacher: Path, speaker: str, recordings: Sequence[Recording], config: Config, out: Path) -> None:
    """Writes one teacher's posteriors over `recordings` to OUT/ctc and OUT/decoder; kept when they are there already.

    Decoder posteriors are teacher-forced: each step has seen the true tokens before it.
    """
    recogniser = load_recogniser(teacher)
    if all(_is_current(out / kind, recogniser.sha256, recordings, config) for kind in KINDS):
        return
    writers = {kind: StoreWriter(out / kind, _index(recogniser, speaker, kind, config)) for kind in KINDS}
    data = TrainingData(recordings, recogniser.student.front_end, recogniser.tokenizer)
    rows: dict[int, dict[Kind, tuple[Entry, Posterior]]] = {}
    for places, batch in batches(data, config.decode.batch_size):
        for place, said in zip(places, posteriors_of(recogniser, batch, config), strict=True):
            rows[place] = {
                kind: (_entry(recordings[place], posterior, log_prob), posterior)
                for kind, (posterior, log_prob) in said.items()
            }
    for place in range(len(recordings)):
        for kind, writer in writers.items():
            writer.add(*rows[place][kind])
    for writer in writers.values():
        writer.close()


def _entry(recording: Recording, posterior: Posterior, log_prob: float) -> Entry:
    return Entry(
        recording=recording.recording,
        audio_sha256=audio_hash(recording),
        steps=len(posterior.ids),
        true_log_prob=log_prob,
    )


def _index(recogniser: Recogniser, speaker: str, kind: Kind, config: Config) -> Index:
    return Index(
        kind=kind,
        temperature=config.objective.temperature,
        top_k=min(config.target.top_k, recogniser.tokenizer.size),
        vocabulary=recogniser.tokenizer.size,
        frame_rate_hz=recogniser.student.frame_rate_hz if kind == "ctc" else None,
        teacher_forced=kind == "decoder",
        tokenizer=recogniser.tokenizer.fingerprint,
        teachers=(speaker,),
        teacher_hashes={speaker: recogniser.sha256},
        heard=config.target.heard,
        provenance=recogniser.provenance,
    )


@torch.inference_mode()
def posteriors_of(recogniser: Recogniser, batch: Batch, config: Config) -> list[dict[Kind, tuple[Posterior, float]]]:
    """For every recording of a batch and both heads: its distributions, and the true text's log-probability a token."""
    student, tokenizer = recogniser.student, recogniser.tokenizer
    assert batch.features is not None
    encoded, frames = student.encode(batch.features, batch.feature_lengths)
    ctc_logits = student.ctc_logits(encoded)
    decoder_logits = student.decoder_logits(decoder_input(batch.tokens, tokenizer.bos), encoded, frames)
    true_ctc = -F.ctc_loss(
        F.log_softmax(ctc_logits, 2).transpose(0, 1), batch.tokens, frames, batch.token_lengths,
        blank=tokenizer.blank, reduction="none",
    ) / batch.token_lengths  # fmt: skip
    true_ctc = true_ctc.clamp(min=LEAST_LOG_PROB)
    steps = F.log_softmax(decoder_logits, 2).gather(2, batch.tokens[:, :, None])[:, :, 0]
    said: list[dict[Kind, tuple[Posterior, float]]] = []
    for row in range(len(batch.recordings)):
        count, length = int(frames[row]), int(batch.token_lengths[row]) + 1
        ctc = posterior_of(ctc_logits[row, :count], "ctc", tokenizer.blank, config)
        decoder = posterior_of(decoder_logits[row, :length], "decoder", tokenizer.blank, config)
        said.append({"ctc": (ctc, float(true_ctc[row])), "decoder": (decoder, float(steps[row, :length].mean()))})
    return said


def posterior_of(logits: torch.Tensor, kind: Kind, blank: int, config: Config) -> Posterior:
    """One recording's logits [T, V] as they are stored: softened, the top k entries."""
    soft = F.softmax(logits.float() / config.objective.temperature, dim=1).numpy()
    if kind == "decoder":
        return top_k(soft, config.target.top_k, np.zeros(len(soft), np.float32))
    # which frames are blank is asked of the teacher as it is, not of its softened copy
    unsoftened = F.softmax(logits.float(), dim=1)[:, blank].clone()  # a view would keep the whole of it
    return top_k(soft, config.target.top_k, unsoftened.numpy())


def _extract_job(job: tuple[Path, str, tuple[Recording, ...], Config, Path]) -> None:
    extract(*job)


def kinds_of(heard: Heard) -> tuple[Kind, ...]:
    """What can be aggregated: frames of different recordings do not line up."""
    return KINDS if heard == "same_audio" else ("decoder",)


def make_targets(
    corpus: Corpus,
    teachers: Teachers,
    fold: Fold,
    recordings: Sequence[Recording],
    config: Config,
    out: Path,
    *,
    jobs: int = 1,
) -> dict[Kind, Index]:
    """Posteriors of every teacher of the fold, then one aggregate a kind in OUT/ctc and OUT/decoder.

    Args:
        corpus: gives bands and, with `same_prompt`, the teachers' own recordings.
        teachers: folder of teachers, trained here or imported; those of held-out or excluded speakers are not asked.
        recordings: what the student will train on.
        config: `target` and `objective.temperature`.

    Raises:
        CorpusError: the fold has no finished teacher. LeakageError: a teacher has heard a held-out speaker.
        TargetError: imported posteriors are of another temperature, tokenizer or audio, or only CTC frames of other
            recordings than the student's.
    """
    forbidden = {*fold.exclude, *(() if fold.include_held_out else fold.held_out)}
    imported = {speaker: teachers.posteriors(speaker) for speaker in teachers.imported}
    speakers = [speaker for speaker in sorted({*teachers.finished, *imported}) if speaker not in forbidden]
    if not speakers:
        raise CorpusError(
            f"{teachers.folder} has no finished teacher for this fold.", "Train them first: 'xded teach'."
        )
    ready = {speaker: imported[speaker] for speaker in speakers if speaker in imported}
    paths = {speaker: teachers.teacher(speaker) / "best.pt" for speaker in speakers if speaker not in ready}
    same_audio = config.target.heard == "same_audio"
    test_takes = frozenset(r.take for r in parts_of(corpus, fold, config).test)
    own = {s: tuple(r for r in corpus.select(speakers=[s]) if r.take not in test_takes) for s in speakers}
    asked = {s: tuple(recordings) if same_audio else own[s] for s in speakers}
    heard = [p for path in paths.values() for p in provenance_of(load(path))]
    heard += [
        p for folder in ready.values() for index in check_imported(folder, corpus, config) for p in index.provenance
    ]
    guard(fold, dict.fromkeys(heard), test_takes)
    folders = {s: out / "posteriors" / s for s in speakers}
    run_all(_extract_job, [(paths[s], s, asked[s], config, folders[s]) for s in paths], jobs)
    for speaker, folder in ready.items():
        shutil.rmtree(folders[speaker], ignore_errors=True)
        shutil.copytree(folder, folders[speaker])
    kinds = kinds_of(config.target.heard)
    made = {}
    for kind in kinds:
        stores = {s: Store(folders[s] / kind) for s in speakers if (folders[s] / kind).is_dir()}
        answered = {s: [r for r in asked[s] if r.recording in store] for s, store in stores.items()}
        if stores:
            made[kind] = aggregate(kind, stores, answered, recordings, corpus, config, out)
    if not made:
        raise TargetError(
            f"{teachers.folder} has CTC posteriors only, and with heard '{config.target.heard}' every teacher has "
            "heard another recording: their frames do not line up.",
            "Give --heard same_audio, or import the decoder's posteriors too.",
        )
    return made


def check_imported(folder: Path, corpus: Corpus, config: Config) -> list[Index]:
    """Indexes of one imported teacher.

    Raises:
        TargetError: they were imported at another temperature, or describe other audio than the corpus has.
    """
    again = "Import them again from this corpus, with this temperature: 'xded import-teachers'."
    hashes = {recording.recording: recording for recording in corpus.recordings}
    indexes = [read_index(folder / kind) for kind in KINDS if (folder / kind).is_dir()]
    for index in indexes:
        if index.temperature != config.objective.temperature:
            raise TargetError(
                f"{folder} was imported at temperature {index.temperature:g}; the objective says "
                f"{config.objective.temperature:g}.", again,
            )  # fmt: skip
        for entry in index.recordings:
            known = hashes.get(entry.recording)
            if known is not None and audio_hash(known) != entry.audio_sha256:
                raise TargetError(
                    f"{folder}: the posterior of '{entry.recording}' describes other audio (its SHA-256 differs).",
                    again,
                )
    return indexes


def aggregate(
    kind: Kind,
    stores: Mapping[str, Store],
    asked: Mapping[str, Sequence[Recording]],
    recordings: Sequence[Recording],
    corpus: Corpus,
    config: Config,
    out: Path,
) -> Index:
    """One target a recording from the stores of its teachers."""
    provenance = tuple(dict.fromkeys(p for store in stores.values() for p in store.index.provenance))
    first = next(iter(stores.values())).index
    index = first.model_copy(
        update={
            "teachers": tuple(stores),
            "teacher_hashes": {s: h for store in stores.values() for s, h in store.index.teacher_hashes.items()},
            "heard": config.target.heard,
            "aggregation": config.target.aggregation,
            "weighting": config.target.weighting,
            "provenance": provenance,
            "recordings": (),
        }
    )
    partners = partners_of(recordings, asked, config)
    bands = {speaker: corpus.band_of(speaker) for speaker in stores}
    writer = StoreWriter(out / kind, index)
    for recording in recordings:
        heard = partners.get(recording.recording, {})
        if not heard:
            continue
        entries = {s: stores[s].entry(heard[s]) for s in heard}
        said = {s: stores[s].read(heard[s]) for s in heard}
        lengths = {len(p.ids) for p in said.values()}
        if len(lengths) > 1:
            raise TargetError(
                f"Teachers disagree on the number of steps of '{recording.recording}': {sorted(lengths)}.",
                "Teachers of one fold must share front end, subsampling and tokenizer; train them with one config.",
            )
        weights = weigh(config.target.weighting, entries, said, bands, recording.band)
        mean = combine([said[s] for s in weights], list(weights.values()), config.target.aggregation, index.vocabulary)
        least_blank = np.min([p.least_blank for p in said.values()], axis=0)
        entry = Entry(
            recording=recording.recording, audio_sha256=audio_hash(recording), steps=len(mean), weight=weights
        )
        writer.add(entry, top_k(mean, config.target.top_k, least_blank))
    return writer.close()


def partners_of(
    recordings: Sequence[Recording], asked: Mapping[str, Sequence[Recording]], config: Config
) -> dict[str, dict[str, str]]:
    """For every recording that the coverage mode keeps: teacher -> id of the recording that the teacher heard.

    With `same_audio` that is the recording itself, for the teachers that have heard it. With `same_prompt` it is the
    teacher's own speaker saying the same block, prompt and microphone; the n-th take is paired with the n-th (around
    in a circle).
    """
    kept = config.target.coverage, config.target.min_teachers
    if config.target.heard == "same_audio":
        known = {s: [r.recording for r in rows] for s, rows in asked.items()}
        heard = coverage(known, *kept)
        return {r.recording: dict.fromkeys(heard[r.recording], r.recording) for r in recordings if r.recording in heard}
    own = {s: _by_key(rows) for s, rows in asked.items()}
    covered = coverage({s: list(keys) for s, keys in own.items()}, *kept)
    seen: dict[tuple[str, tuple[str, str, str]], int] = {}
    partners = {}
    for recording in sorted(recordings, key=lambda r: r.take):
        key = key_of(recording)
        place = seen.get((recording.speaker, key), 0)
        seen[(recording.speaker, key)] = place + 1
        if key in covered:
            partners[recording.recording] = {s: own[s][key][place % len(own[s][key])] for s in covered[key]}
    return partners


def _by_key(recordings: Sequence[Recording]) -> dict[tuple[str, str, str], list[str]]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for recording in sorted(recordings, key=lambda r: r.take):
        rows.setdefault(key_of(recording), []).append(recording.recording)
    return rows
