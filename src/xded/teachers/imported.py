"""Teachers from elsewhere: posteriors that other tools exported become stores that `xded targets` aggregates.

`exports` says which files there may be, `foreign_files` reads them, `import_checks` judges what was seen of them.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from xded.checks.targets import copied_hashes
from xded.checks.teachers import best_path, text_of
from xded.config import Config
from xded.corpus.folds import Provenance
from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError, TokenizerError, XdedError, few
from xded.findings import Finding
from xded.models.checkpoints import sha256_of
from xded.parallel import run_all
from xded.targets.aggregate import LEAST
from xded.targets.store import Entry, Index, Kind, Posterior, StoreWriter, TargetError, audio_hash, read_index
from xded.teachers.adapt import IMPORTED, Teachers
from xded.teachers.exports import LAYOUT, Export, Metadata, find_exports, hash_of, read_metadata
from xded.teachers.foreign_files import open_arrays
from xded.teachers.import_checks import NO_SCALE, SURE, Seen, Stream, findings_of, frames_off, scale_of
from xded.teachers.posteriors import KINDS, LEAST_LOG_PROB, posterior_of
from xded.tokenizer import Tokenizer, normalise

FRAME_RATE_HZ: Final = 25.0  # of encoders that keep every fourth frame of 10 ms


@dataclass
class Imported:
    """What became of one teacher. JSON-able, but for the problem that stopped it."""

    teacher: str
    streams: list[Stream] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problem: XdedError | None = None


@dataclass(frozen=True)
class Plan:
    """How a teacher is imported: the same for all teachers of a call."""

    corpus: Corpus
    tokenizer: Tokenizer
    config: Config
    heard: tuple[str, ...]
    frame_rate_hz: float
    out: Path


def import_teachers(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: Config,
    out: Path,
    *,
    heard: Sequence[str] = (),
    frame_rate_hz: float = FRAME_RATE_HZ,
    jobs: int = 1,
) -> list[Imported]:
    """Stores of all teachers below a folder, in OUT/posteriors/<speaker>, and the tokenizer in OUT.

    A head is stored whole or not at all: not when a finding says `refuse`, not when its file cannot be read. Teachers
    that are there already, from the same files and settings, are kept.

    Args:
        folder: laid out as `exports` says. corpus: has the recordings; a teacher is called as its speaker.
        tokenizer: the teachers'.
        config: `objective.temperature` and `target.top_k`.
        out: folder of teachers, as of `xded teach`.
        heard: speakers that every teacher has heard besides its own: nobody but the user can know.
        frame_rate_hz: CTC frames a second.

    Raises:
        CorpusError: a speaker that the corpus does not have. TokenizerError: OUT has teachers of another tokenizer.
        TargetError: no files of this layout, or a teacher of the speaker was trained in OUT.
    """
    exports, teachers = find_exports(folder), Teachers(out)
    corpus.require(heard)
    unknown = sorted({export.teacher for export in exports} - set(corpus.speakers))
    if unknown:
        raise CorpusError(
            f"{folder} has teachers of {few(unknown)}, of whom {corpus.path} has no recordings.",
            "Teachers are called as their speakers: rename the files, or leave them out.",
        )
    trained = sorted({export.teacher for export in exports} & set(teachers.finished))
    if trained:
        raise TargetError(f"{out} has trained teachers of {few(trained)}.", "Choose another --out.")
    _need_same_tokenizer(tokenizer, teachers)
    plan = Plan(corpus, tokenizer, config, tuple(sorted(set(heard))), frame_rate_hz, out)
    imported = run_all(_import, [(plan, export) for export in exports], jobs)
    if teachers.imported and not teachers.tokenizer.is_file():
        temporary = teachers.tokenizer.with_name(teachers.tokenizer.name + ".tmp")
        temporary.write_bytes(tokenizer.model_bytes)
        temporary.replace(teachers.tokenizer)
    return imported


def copies(imported: Sequence[Imported], subject: str) -> list[Finding]:
    """Teachers that are one file under several names."""
    found = []
    for kind in KINDS:
        hashes = {s.teacher: s.sha256 for one in imported for s in one.streams if s.kind == kind}
        found += copied_hashes(hashes, f"{subject} ({kind})")
    return found


def _need_same_tokenizer(tokenizer: Tokenizer, teachers: Teachers) -> None:
    kept = {index.tokenizer for speaker in teachers.imported for index in _indexes(teachers.posteriors(speaker))}
    if teachers.tokenizer.is_file():
        kept.add(Tokenizer.load(teachers.tokenizer, tokenizer.normaliser).fingerprint)
    if kept - {tokenizer.fingerprint}:
        raise TokenizerError(
            f"{teachers.folder} has teachers of another tokenizer than {tokenizer.source} (or of another normaliser "
            f"than '{tokenizer.normaliser}').",
            "Choose another --out: teachers of one folder share one tokenizer.",
        )


def _indexes(folder: Path) -> Iterator[Index]:
    for kind in KINDS:
        if (folder / kind).is_dir():
            yield read_index(folder / kind)


def _import(job: tuple[Plan, Export]) -> Imported:
    """One teacher; an error is kept with it, so that the others are imported all the same."""
    try:
        return import_teacher(*job)
    except XdedError as error:
        return Imported(job[1].teacher, problem=error)


def import_teacher(plan: Plan, export: Export) -> Imported:
    """Reads, checks and stores one teacher; what is refused leaves no trace.

    Raises:
        TargetError: files that cannot be read, that do not fit together, or that are of another tokenizer.
    """
    hashes = {kind: hash_of(path) for kind, path in export.files.items()}
    metadata = read_metadata(export.metadata) if export.metadata.is_file() else None
    final = Teachers(plan.out).posteriors(export.teacher)
    settings = _settings(plan, export, hashes)
    kept = _kept(final, settings)
    if kept is not None:
        return kept
    shutil.rmtree(final, ignore_errors=True)  # of other files or settings: whatever comes of these, it is stale
    new = not plan.out.exists()
    temporary = final.with_name(final.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    result = Imported(export.teacher)
    try:
        for kind, path in export.files.items():
            reader = _Reader(plan, export, kind, metadata, temporary / kind, hashes[kind])
            reader.read(path)
            result.streams.append(reader.stream)
            result.findings += reader.findings
        if any(stream.status == "imported" for stream in result.streams):
            rows = {"streams": [asdict(s) for s in result.streams], "findings": [asdict(f) for f in result.findings]}
            (temporary / IMPORTED).write_text(json.dumps({"settings": settings, **rows}, indent=1), encoding="utf-8")
            temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in (final.parent, plan.out) if new else ():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return result


def _settings(plan: Plan, export: Export, hashes: dict[Kind, str]) -> dict[str, Any]:
    """Everything that an import depends on."""
    return {
        "files": hashes,
        "metadata": sha256_of(export.metadata) if export.metadata.is_file() else None,
        "corpus": sha256_of(plan.corpus.path),
        "tokenizer": plan.tokenizer.fingerprint,
        "temperature": plan.config.objective.temperature,
        "top_k": plan.config.target.top_k,
        "frame_rate_hz": plan.frame_rate_hz,
        "heard": list(plan.heard),
    }


def _kept(folder: Path, settings: dict[str, Any]) -> Imported | None:
    """What was imported before, when it is whole and nothing has changed."""
    try:
        said = json.loads((folder / IMPORTED).read_text(encoding="utf-8"))
        if said["settings"] != settings:
            return None
        streams = [Stream(**row) for row in said["streams"]]
        findings = [Finding(**row) for row in said["findings"]]
        list(_indexes(folder))
    except (OSError, ValueError, KeyError, TypeError, XdedError):  # missing or damaged: it is made anew
        return None
    return Imported(folder.name, streams, findings)


class _Reader:
    """One file of one teacher: every recording looked at once, and stored."""

    def __init__(
        self, plan: Plan, export: Export, kind: Kind, metadata: Metadata | None, folder: Path, digest: str
    ) -> None:
        self.plan, self.kind, self.metadata, self.folder = plan, kind, metadata, folder
        path, tokenizer = export.files[kind], plan.tokenizer
        self.stream = Stream(export.teacher, kind, path.name, digest, teacher_forced=kind == "decoder")
        self.findings: list[Finding] = []
        self.index = Index(
            kind=kind,
            temperature=plan.config.objective.temperature,
            top_k=min(plan.config.target.top_k, tokenizer.size),
            vocabulary=tokenizer.size,
            frame_rate_hz=plan.frame_rate_hz if kind == "ctc" else None,
            teacher_forced=self.stream.teacher_forced,
            tokenizer=tokenizer.fingerprint,
            teachers=(export.teacher,),
            teacher_hashes={export.teacher: digest},
            provenance=(
                Provenance(
                    f"teacher {export.teacher} ({path.name})", frozenset((export.teacher, *plan.heard)),
                    known=bool(plan.heard),
                ),
            ),
        )  # fmt: skip
        self.corpus = {recording.recording: recording for recording in plan.corpus.recordings}
        self.tokens: dict[str, list[int]] = {}
        self.lengths: list[Entry] = []
        self.best_ids, self.best_probabilities = bytearray(), bytearray()  # of all stored steps, one after the other
        self.lengths_stored: dict[str, int] = {}
        self.same: dict[tuple[int, int], list[str]] = {}
        self.sure = self.counted = 0

    def read(self, path: Path) -> None:
        """Streams the file into the store, then judges it."""
        with open_arrays(path) as arrays:
            names = self._names(path, arrays.names, arrays.count)
            repeated = {name for name, count in Counter(names).items() if count > 1}
            self.stream.recordings = len(names)
            writer = StoreWriter(self.folder, self.index)
            for place, (name, values) in enumerate(zip(names, arrays.rows, strict=True)):
                if name not in self.corpus or name in repeated:
                    self.stream.leave_out("unknown" if name not in self.corpus else "repeated", name)
                    continue
                self.stream.matched += 1
                self._look(path, place, self.corpus[name], values, writer)
        if not self.stream.matched:
            raise TargetError(
                f"{path}: none of its {len(names)} ids is a recording of {self.plan.corpus.path} (the file: "
                f"{few(names, 2)}; the corpus: {few(self.corpus, 2)}).",
                "Ids of the file must be recording ids of the corpus.",
            )
        self._judge()
        if any(finding.severity == "refuse" for finding in self.findings) or not self.stream.stored:
            self.stream.status = "refused"
            shutil.rmtree(self.folder)
        else:
            writer.close()

    def _names(self, path: Path, own: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
        """Ids of the file's rows: its own, else those of the metadata."""
        if not count:
            raise TargetError(f"{path} is empty: it holds no recording.", "Export it again.")
        listed = self.metadata.utterance_ids if self.metadata else None
        if own is None and listed is None:
            raise TargetError(
                f"{path} has rows without ids, and {self.stream.teacher}_metadata.json is not beside it.", LAYOUT
            )
        if listed is not None and len(listed) != count:
            raise TargetError(
                f"{path} holds {count} recordings, but its metadata lists {len(listed)}: nobody knows whose rows are "
                "whose.",
                "Export metadata and posteriors again, together.",
            )
        if own is None:
            assert listed is not None
            return listed
        return own

    def _said(self, name: str, place: int) -> tuple[str | None, int | None]:
        """Word and CTC frames that the metadata gives a recording."""
        if self.metadata is None:
            return None, None
        if place >= len(self.metadata.utterance_ids) or self.metadata.utterance_ids[place] != name:  # the file has ids
            if name not in self.metadata.utterance_ids:
                return None, None
            place = self.metadata.utterance_ids.index(name)
        words, frames = self.metadata.target_words, self.metadata.ctc_frame_lens
        return words[place] if words else None, frames[place] if frames else None

    def _look(self, path: Path, place: int, recording: Recording, values: np.ndarray, writer: StoreWriter) -> None:
        """One recording: why it is left out, or what it says."""
        name, stream, tokenizer = recording.recording, self.stream, self.plan.tokenizer
        self._need_vocabulary(path, name, values.shape[1])
        tokens = self.tokens.setdefault(name, tokenizer.encode(recording.text))
        self.lengths.append(Entry(name, audio_hash(recording), len(values)))
        word, frames = self._said(name, place)
        off = (
            frames_off(len(values), recording.duration, self.plan.frame_rate_hz)
            if self.kind == "ctc" else len(values) != len(tokens) + 1
        )  # fmt: skip
        if word is not None and normalise(word, tokenizer.normaliser) != normalise(
            recording.text, tokenizer.normaliser
        ):
            return stream.leave_out("text", name)
        if self.kind == "ctc" and frames is not None and frames != len(values):
            return stream.leave_out("frames", name)
        highest = values.max(1)
        if np.isnan(highest).any() or np.isinf(highest).any():
            return stream.leave_out("not finite", name)
        scale = scale_of(values)
        if scale == NO_SCALE:
            return stream.leave_out("scale", name)
        if off:
            return stream.leave_out("length", name)
        stream.scales[scale] = stream.scales.get(scale, 0) + 1
        self.same.setdefault((zlib.crc32(values.tobytes()), values.size), []).append(name)
        if scale == "probabilities":
            values = np.log(np.maximum(values, LEAST))
        writer.add(*self._stored(recording, tokens, values))
        return None

    def _need_vocabulary(self, path: Path, name: str, width: int) -> None:
        """Refuses another vocabulary; a CTC head need not have columns for <s>, </s> and <unk> when they come last."""
        tokenizer = self.plan.tokenizer
        spare = {tokenizer.bos, tokenizer.eos, tokenizer.unk} - {tokenizer.blank} if self.kind == "ctc" else set()
        if width > tokenizer.size or not set(range(width, tokenizer.size)) <= spare:
            raise TargetError(
                f"{path}: '{name}' has {width} columns, but {tokenizer.source} has {tokenizer.size} ids: these are "
                "posteriors of another tokenizer.",
                "Give the tokenizer of the teachers with --tokenizer.",
            )

    def _stored(self, recording: Recording, tokens: list[int], values: np.ndarray) -> tuple[Entry, Posterior]:
        """The softened top k of one recording, and what is counted of it."""
        name, stream, tokenizer = recording.recording, self.stream, self.plan.tokenizer
        logits = F.pad(torch.from_numpy(values), (0, tokenizer.size - values.shape[1]), value=-torch.inf)
        log_probs = F.log_softmax(logits, dim=1)
        posterior = posterior_of(logits, self.kind, tokenizer.blank, self.plan.config)
        ids, probabilities = best_path(posterior)
        self.best_ids += ids.astype(np.int64).tobytes()
        self.best_probabilities += probabilities.astype(np.float32).tobytes()
        self.lengths_stored[name] = len(ids)
        highest = log_probs.max(1).values.exp().numpy()
        counted = highest[ids != tokenizer.blank] if self.kind == "ctc" else highest
        self.sure, self.counted = self.sure + int((counted > SURE).sum()), self.counted + len(counted)
        stream.top += float(highest.sum())
        stream.steps += len(values)
        stream.stored += 1
        wanted = normalise(recording.text, tokenizer.normaliser)
        stream.right += text_of(posterior, self.kind, tokenizer) == wanted
        stream.ended += self.kind == "decoder" and int(ids[-1]) == tokenizer.eos
        log_prob = max(LEAST_LOG_PROB, _true_log_prob(log_probs, tokens, self.kind, tokenizer))
        return Entry(name, audio_hash(recording), len(values), true_log_prob=log_prob), posterior

    def _best(self) -> dict[str, Posterior]:
        """The most probable id of every step: [T, 1] of each stored recording."""
        ids = np.frombuffer(self.best_ids, np.int64)[:, None]
        probabilities = np.frombuffer(self.best_probabilities, np.float32)[:, None]
        found, start = {}, 0
        for name, steps in self.lengths_stored.items():
            rows = slice(start, start := start + steps)
            rest = 1 - probabilities[rows, 0]
            found[name] = Posterior(ids[rows], probabilities[rows], rest, np.zeros_like(rest))
        return found

    def _judge(self) -> None:
        """Counts over all recordings, and what is wrong."""
        stream, tokenizer = self.stream, self.plan.tokenizer
        there = {entry.recording for entry in self.lengths} | set(stream.left_out.get("repeated", ()))
        own = self.plan.corpus.select(speakers=[stream.teacher])
        stream.missing = [r.recording for r in own if r.recording not in there]
        stream.twins = [names for names in self.same.values() if len(names) > 1]
        stream.top /= max(stream.steps, 1)
        stream.sure = self.sure / max(self.counted, 1)
        known = [self.corpus[entry.recording] for entry in self.lengths]
        seen = Seen(
            lengths=self.index.model_copy(update={"recordings": tuple(self.lengths)}),
            best=self._best(),
            texts={r.recording: normalise(r.text, tokenizer.normaliser) for r in known},
            tokens=self.tokens,
            durations_s={r.recording: r.duration for r in known},
        )
        self.findings = findings_of(stream, seen, tokenizer)


def _true_log_prob(log_probs: torch.Tensor, tokens: Sequence[int], kind: Kind, tokenizer: Tokenizer) -> float:
    """Log-probability a token of the true text, from [T, V]."""
    if kind == "decoder":
        steps = torch.tensor([*tokens, tokenizer.eos])
        return float(log_probs.gather(1, steps[:, None]).mean())
    loss = F.ctc_loss(
        log_probs[:, None], torch.tensor([list(tokens)]), torch.tensor([len(log_probs)]), torch.tensor([len(tokens)]),
        blank=tokenizer.blank, reduction="none",
    )  # fmt: skip
    return -float(loss[0]) / max(len(tokens), 1)
