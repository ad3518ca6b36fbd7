"""What one teacher says about recordings: posteriors of both heads and of listed words, stored as top-k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from xded.config import Config
from xded.corpus.manifest import Recording
from xded.decoding import ctc_greedy, word_list_scores
from xded.errors import few
from xded.models.recogniser import Recogniser, load_recogniser
from xded.models.student import decoder_input
from xded.targets.aggregate import top_k
from xded.targets.store import Entry, Index, Kind, Posterior, StoreWriter, TargetError, audio_hash, read_index
from xded.tokenizer import Tokenizer, normalise
from xded.training.data import Batch, TrainingData
from xded.training.evaluation import batches

KINDS: tuple[Kind, ...] = ("ctc", "decoder")  # of the heads
LEAST_LOG_PROB = -100.0  # of a text that does not fit into its frames: JSON has no infinity
LEAST_WORD = -1e4  # the same among words: where none fits, all are alike


class Said(NamedTuple):
    """What a teacher says about one recording.

    log_prob: of the true text, a token (of the true word, for words), not softened. text: greedy, of the CTC head.
    """

    posterior: Posterior
    log_prob: float
    text: str


class WordList(NamedTuple):
    """Listed words, normalised and sorted, and their tokens."""

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, words: Sequence[str], tokenizer: Tokenizer) -> WordList:
        """The list that any order and spelling of its words gives.

        Raises:
            TargetError: there are none. TokenizerError: a word that the tokenizer cannot write.
        """
        listed = tuple(sorted({normalise(word, tokenizer.normaliser) for word in words}))
        if not listed:
            raise TargetError("Posteriors of words need a list of words.", "Give the texts of the corpus.")
        tokenizer.self_test(listed)
        return cls(listed, tuple(tuple(tokenizer.encode(word)) for word in listed))


def extracted_kinds(config: Config) -> tuple[Kind, ...]:
    """Kinds that every teacher is asked for: both heads, and the listed words where the objective reads them."""
    return (*KINDS, "words") if "words" in config.objective.kinds else KINDS


def _is_current(
    folder: Path, teacher_hash: str, recordings: Sequence[Recording], config: Config, words: tuple[str, ...]
) -> bool:
    """Whether posteriors are there, of this teacher, these recordings and words and this temperature."""
    try:
        index = read_index(folder)
    except TargetError:  # missing, unfinished or damaged: it is made anew
        return False
    return (
        list(index.teacher_hashes.values()) == [teacher_hash]
        and index.temperature == config.objective.temperature
        and index.top_k == min(config.target.top_k, index.vocabulary)
        and index.words == (words if index.kind == "words" else ())
        and {e.recording: e.audio_sha256 for e in index.recordings} == {r.recording: audio_hash(r) for r in recordings}
        and all(entry.text is not None for entry in index.recordings)  # earlier versions did not store it
    )


def extract(
    teacher: Path, speaker: str, recordings: Sequence[Recording], config: Config, out: Path, words: Sequence[str] = ()
) -> None:
    """Writes one teacher's posteriors over `recordings` to OUT/ctc, OUT/decoder and, where the objective reads them,
    OUT/words, batch by batch; what is there already is kept.

    Decoder posteriors are teacher-forced: each step has seen the true tokens before it.

    Args:
        teacher: checkpoint, of a teacher or of the parent (then `speaker` is `targets.weighting.PARENT`).
        config: `objective.temperature`, `objective.kinds`, `target.top_k`, `target.heard`.
        words: that the corpus lists; all teachers of a fold must be given the same.

    Raises:
        TargetError: posteriors of words without words, or of a recording whose text is not listed.
    """
    recogniser = load_recogniser(teacher)
    wanted = extracted_kinds(config)
    listed = WordList.of(words, recogniser.tokenizer) if "words" in wanted else WordList((), ())
    missing = [
        kind for kind in wanted
        if (kind != "decoder" or recogniser.student.has_decoder)
        and not _is_current(out / kind, recogniser.sha256, recordings, config, listed.words)
    ]  # fmt: skip
    if not missing:
        return
    if "words" in missing:
        _need_listed(recordings, listed, recogniser.tokenizer)
    writers = {k: StoreWriter(out / k, _index(recogniser, speaker, k, config, listed.words)) for k in missing}
    data = TrainingData(recordings, recogniser.student.front_end, recogniser.tokenizer)
    for places, batch in batches(data, config.decode.batch_size):
        for place, said in zip(places, posteriors_of(recogniser, batch, config, missing, listed), strict=True):
            for kind, writer in writers.items():
                writer.add(_entry(recordings[place], said[kind]), said[kind].posterior)
    for writer in writers.values():
        writer.close()


def _need_listed(recordings: Sequence[Recording], listed: WordList, tokenizer: Tokenizer) -> None:
    strange = sorted({r.text for r in recordings if normalise(r.text, tokenizer.normaliser) not in listed.words})
    if strange:
        raise TargetError(
            f"The word list does not have {few(strange)}, which recordings say.",
            "List every text of the corpus that the targets are made for.",
        )


def _entry(recording: Recording, said: Said) -> Entry:
    return Entry(
        recording=recording.recording,
        audio_sha256=audio_hash(recording),
        steps=len(said.posterior.ids),
        true_log_prob=said.log_prob,
        text=said.text,
    )


def _index(recogniser: Recogniser, speaker: str, kind: Kind, config: Config, words: tuple[str, ...]) -> Index:
    vocabulary = len(words) if kind == "words" else recogniser.tokenizer.size
    return Index(
        kind=kind,
        temperature=config.objective.temperature,
        top_k=min(config.target.top_k, vocabulary),
        vocabulary=vocabulary,
        frame_rate_hz=recogniser.student.frame_rate_hz if kind == "ctc" else None,
        teacher_forced=kind == "decoder",
        tokenizer=recogniser.tokenizer.fingerprint,
        teachers=(speaker,),
        teacher_hashes={speaker: recogniser.sha256},
        heard=config.target.heard,
        provenance=recogniser.provenance,
        words=words if kind == "words" else (),
    )


@torch.inference_mode()
def posteriors_of(
    recogniser: Recogniser,
    batch: Batch,
    config: Config,
    kinds: Sequence[Kind] = KINDS,
    listed: WordList | None = None,
) -> list[dict[Kind, Said]]:
    """What a teacher says about every recording of a batch, by kind; `listed` is needed for words."""
    student, tokenizer = recogniser.student, recogniser.tokenizer
    assert batch.features is not None
    encoded, frames = student.encode(batch.features, batch.feature_lengths)
    logits = student.ctc_logits(encoded)
    log_probs = F.log_softmax(logits, 2)
    heard = [tokenizer.decode(tokens) for tokens, _ in ctc_greedy(log_probs, frames, tokenizer.blank)]
    said: list[dict[Kind, Said]] = [{} for _ in heard]
    if "ctc" in kinds:
        true = -F.ctc_loss(
            log_probs.transpose(0, 1), batch.tokens, frames, batch.token_lengths,
            blank=tokenizer.blank, reduction="none",
        ) / batch.token_lengths  # fmt: skip
        true = true.clamp(min=LEAST_LOG_PROB)
        for row, count in enumerate(frames.tolist()):
            posterior = posterior_of(logits[row, :count], "ctc", tokenizer.blank, config)
            said[row]["ctc"] = Said(posterior, float(true[row]), heard[row])
    if "decoder" in kinds:
        logits = student.decoder_logits(decoder_input(batch.tokens, tokenizer.bos), encoded, frames)
        steps = F.log_softmax(logits, 2).gather(2, batch.tokens[:, :, None])[:, :, 0]
        for row, length in enumerate((batch.token_lengths + 1).tolist()):
            posterior = posterior_of(logits[row, :length], "decoder", tokenizer.blank, config)
            said[row]["decoder"] = Said(posterior, float(steps[row, :length].mean()), heard[row])
    if "words" in kinds:
        assert listed is not None
        scores = word_list_scores(student, encoded, frames, listed.tokens, 1.0, tokenizer).clamp(min=LEAST_WORD)
        for row, length in enumerate(batch.token_lengths.tolist()):
            place = listed.tokens.index(tuple(batch.tokens[row, :length].tolist()))
            true_word = max(LEAST_LOG_PROB, float(F.log_softmax(scores[row], 0)[place]))
            said[row]["words"] = Said(posterior_of_words(scores[row], config), true_word, heard[row])
    return said


def posterior_of(logits: torch.Tensor, kind: Kind, blank: int, config: Config) -> Posterior:
    """One recording's logits [T, V] as they are stored: softened, the top k entries."""
    soft = F.softmax(logits.float() / config.objective.temperature, dim=1).numpy()
    if kind == "decoder":
        return top_k(soft, config.target.top_k, np.zeros(len(soft), np.float32))
    # which frames are blank is asked of the teacher as it is, not of its softened copy
    unsoftened = F.softmax(logits.float(), dim=1)[:, blank].clone()  # a view would keep the whole of it
    return top_k(soft, config.target.top_k, unsoftened.numpy())


def posterior_of_words(scores: torch.Tensor, config: Config) -> Posterior:
    """log p_ctc(word | audio) of every listed word, [W], as one softened step.

    At T = 1 the softmax is p(word | audio, the word is listed) of the CTC head if all words are as frequent. That is
    why scores are not divided by the number of tokens: they are log-probabilities of whole words.
    """
    soft = F.softmax(scores / config.objective.temperature, dim=0)[None].float().numpy()
    return top_k(soft, config.target.top_k, np.zeros(1, np.float32))
