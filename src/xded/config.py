"""One tree of frozen models: YAML file, command-line flags, JSON schema and documentation come from here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xded.errors import ConfigError

Aggregation = Literal["prob_mean", "logprob_mean", "logit_mean"]
Weighting = Literal["uniform", "reliability", "confidence", "band", "likelihood", "embedding", "accuracy"]
Asked = Literal["all", "own", "own_and_parent"]
Heard = Literal["same_audio", "same_prompt"]
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
PATHS = ("corpus", "targets", "train.init", "train.guide", "tokenizer.path", "model.pretrained")  # of files


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FeatureConfig(Section):
    """Log-mel front end; the defaults are those of NeMo's Conformer-CTC models."""

    sample_rate: int = Field(16_000, description="Hz; recordings at another rate are resampled when they are read")
    mels: int = Field(80, description="mel bands", ge=8)
    window_s: float = Field(0.025, description="analysis window, seconds")
    hop_s: float = Field(0.010, description="step between frames, seconds")
    n_fft: int = Field(512, description="FFT size, samples")
    preemphasis: float = Field(0.97, description="first-order pre-emphasis coefficient; 0 switches it off")
    normalisation: Literal["per_recording", "global"] = Field(
        "per_recording",
        description="mean and standard deviation per mel: of each recording (NeMo), or of the training recordings",
    )


class AugmentConfig(Section):
    """Changes to training features and to their audio. `tempo`, `speed`, `dysarthria` alone move the time axis."""

    frequency_masks: int = Field(2, description="SpecAugment frequency masks per recording", ge=0)
    frequency_mask_width: int = Field(12, description="widest frequency mask, mel bands", ge=0)
    time_masks: int = Field(2, description="SpecAugment time masks per recording", ge=0)
    time_mask_share: float = Field(0.08, description="widest time mask, share of the recording", ge=0, le=1)
    mel_warp: float = Field(0.12, description="largest stretch of the mel axis (vocal-tract length), share", ge=0, lt=1)
    noise: float = Field(0.1, description="standard deviation of Gaussian noise on normalised features", ge=0)
    tempo: float = Field(0.0, description="largest stretch of the time axis, share; not with CTC targets", ge=0, lt=1)
    mix_style: float = Field(
        0.0, description="share of batches whose recordings mix the statistics of early features (MixStyle)", ge=0, le=1
    )
    views: int = Field(4, description="versions of each recording that the changes to audio below make, once", ge=1)
    speed: float = Field(0.0, description="largest change of speed (tempo and pitch); not with CTC targets", ge=0, lt=1)
    pitch: float = Field(0.0, description="largest change of pitch alone, semitones", ge=0, le=12)
    noise_db: float | None = Field(None, description="lowest signal-to-noise ratio of added noise, dB; none: no noise")
    reverberation_s: float = Field(0.0, description="longest reverberation time (T60), seconds", ge=0, le=2)
    dysarthria: float = Field(
        0.0, description="highest severity of simulated dysarthria; not with CTC targets", ge=0, le=1
    )


class TokenizerConfig(Section):
    """How prompts become token ids."""

    path: Path | None = Field(
        None,
        description="tokenizer to load, of any format that 'xded tokenizer' reads; none: one is trained on the prompts",
    )
    kind: Literal["char", "bpe", "unigram"] = Field("char", description="kind of model to train")
    vocabulary: int = Field(64, description="largest number of pieces to train", ge=5)
    normaliser: Literal["upper", "lower", "upper_no_punctuation", "lower_no_punctuation"] = Field(
        "upper", description="what is done to a text before it is encoded or compared"
    )


class HuggingFaceConfig(Section):
    """What a Hugging Face folder says about its encoder; read from there, never written by hand."""

    encoder: dict[str, Any] = Field(description="its config.json")
    front_end: dict[str, Any] = Field(description="its preprocessor_config.json")


class ModelConfig(Section):
    """Student, parent and teacher: Conformer encoder, CTC head, attention decoder."""

    pretrained: Path | None = Field(
        None,
        description="encoder that training begins with: a .nemo archive, or a Hugging Face folder or name; it sets the "
        "encoder's sizes and its features",
    )
    hugging_face: HuggingFaceConfig | None = Field(
        None, description="encoder and front end of a Hugging Face folder, in the place of the Conformer"
    )
    size: Literal["micro", "tiny", "small", "base"] | None = Field(
        "tiny", description="named size; a field given beside it wins over the size's value"
    )
    width: int = Field(88, description="D, width of the encoder and the decoder", ge=8)
    encoder_layers: int = Field(4, description="Conformer layers", ge=1)
    heads: int = Field(4, description="attention heads", ge=1)
    kernel: int = Field(15, description="width of the depthwise convolution, frames (odd)", ge=3)
    feed_forward_factor: int = Field(4, description="width of the feed-forward layers over D", ge=1)
    subsampling_channels: int = Field(32, description="channels of the 4x subsampling convolutions", ge=1)
    decoder_layers: int = Field(4, description="Transformer decoder layers; 0: CTC alone, without a decoder", ge=0)
    decoder_feed_forward: int = Field(192, description="width of the decoder's feed-forward layers", ge=8)
    dropout: float = Field(0.1, description="dropout everywhere", ge=0, lt=1)
    whiten_layers: int = Field(
        0, description="first encoder layers whose outputs lose their mean and variance over time (UniStyle)", ge=0
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            size = data.get("size", "tiny")
            return {**SIZES.get(size, {}), **data} if isinstance(size, str) else data
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even; an odd width keeps frames in place")
        return self


SIZES: dict[str, dict[str, int]] = {
    # 0.3 M parameters: the demo's student
    "micro": {
        "width": 64, "encoder_layers": 3, "heads": 4, "kernel": 15, "feed_forward_factor": 2,
        "subsampling_channels": 16, "decoder_layers": 1, "decoder_feed_forward": 128,
    },
    # under 1 M parameters
    "tiny": {
        "width": 88, "encoder_layers": 4, "heads": 4, "kernel": 15, "feed_forward_factor": 2,
        "subsampling_channels": 24, "decoder_layers": 4, "decoder_feed_forward": 88,
    },
    # NeMo Conformer-CTC small, and the reference study's decoder
    "small": {
        "width": 176, "encoder_layers": 16, "heads": 4, "kernel": 31, "feed_forward_factor": 4,
        "subsampling_channels": 176, "decoder_layers": 4, "decoder_feed_forward": 1024,
    },
    # NeMo Conformer-CTC medium
    "base": {
        "width": 256, "encoder_layers": 18, "heads": 4, "kernel": 31, "feed_forward_factor": 4,
        "subsampling_channels": 256, "decoder_layers": 4, "decoder_feed_forward": 1024,
    },
}  # fmt: skip


class FoldConfig(Section):
    """Who is held out, who trains, and how training recordings are kept for choosing the best checkpoint."""

    held_out: tuple[str, ...] = Field((), description="speakers of whom nothing may be heard before the test")
    exclude: tuple[str, ...] = Field((), description="speakers left out altogether")
    withhold: tuple[str, ...] = Field((), description="speakers whose recordings train nothing but their own teachers")
    include_held_out: bool = Field(
        False, description="train on half of the held-out speakers' takes too (a diagnostic, marked in every score)"
    )
    controls: bool = Field(True, description="train on the control speakers too")
    validation: Literal["takes", "speakers"] = Field("takes", description="what validation keeps from training")
    validation_fraction: float = Field(0.1, description="share of takes (or speakers) kept", ge=0, lt=1)
    split_seed: int = Field(0, description="of the draw, apart from `seed`: all seeds train on the same takes", ge=0)


class ObjectiveConfig(Section):
    """Weights of the parts of the loss. With all weights of teachers 0 the run is supervised and needs no targets."""

    ctc: float = Field(0.5, description="weight of CTC on the true text", ge=0)
    cross_entropy: float = Field(0.5, description="weight of the decoder's cross-entropy on the true text", ge=0)
    ctc_kd: float = Field(0.0, description="weight of CTC-KD", ge=0)
    decoder_kd: float = Field(0.0, description="weight of decoder-KD", ge=0)
    word_kd: float = Field(0.0, description="weight of KD on the listed words (one distribution a recording)", ge=0)
    text_kd: float = Field(0.0, description="weight of CTC on the text that the teachers hear", ge=0)
    feature_kd: float = Field(0.0, description="weight of the distance to the parent's encoder outputs", ge=0)
    consistency: float = Field(
        0.0, description="weight of XDED on decoder steps: agreement of speakers within a batch (paper: 5)", ge=0
    )
    word_consistency: float = Field(0.0, description="weight of XDED on the batch's words, by the CTC head", ge=0)
    consistency_temperature: float = Field(4.0, description="T of both consistencies", gt=0)
    adversary: float = Field(0.0, description="weight of a speaker classifier whose gradient is reversed", ge=0)
    temperature: float = Field(2.0, description="T of the targets", gt=0)
    temperature_end: float | None = Field(
        None, description="T at the end of the run, reached linearly; none: T stays", gt=0
    )
    kd_end: float = Field(
        1.0, description="share of the teachers' weights that is left at the end of the run, reached linearly", ge=0
    )
    blank_threshold: float = Field(0.95, description="frames that every teacher calls blank are dropped above", gt=0)
    label_smoothing: float = Field(0.0, description="label smoothing of the cross-entropy", ge=0, lt=1)

    @property
    def supervised(self) -> Self:
        """The true text alone: what baselines, parents and teachers learn, and what validation measures."""
        return self.model_copy(update=dict.fromkeys((*OF_TEACHERS, *OF_SPEAKERS), 0.0))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of targets that the objective reads (`targets.store.Kind`)."""
        asked = {"ctc": self.ctc_kd or self.text_kd, "decoder": self.decoder_kd, "words": self.word_kd}
        return tuple(kind for kind, weight in asked.items() if weight)

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads that are told what is right: `ctc`, `decoder`."""
        ctc = self.ctc + self.ctc_kd + self.word_kd + self.text_kd
        told = {"ctc": ctc, "decoder": self.cross_entropy + self.decoder_kd}
        return tuple(head for head, weight in told.items() if weight)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ctc + self.cross_entropy <= 0:
            raise ValueError("ground truth has no weight: set ctc or cross_entropy above 0")
        for name, head in (("consistency", "decoder"), ("word_consistency", "ctc")):
            if getattr(self, name) and head not in self.heads:
                raise ValueError(f"{name} alone makes the {head} head say the same of everything; train it too")
        return self


OF_TEACHERS = ("ctc_kd", "decoder_kd", "word_kd", "text_kd", "feature_kd")  # weights of what others know
OF_SPEAKERS = ("consistency", "word_consistency", "adversary")  # weights of what speakers have in common
LOSS_PARTS = ("ctc", "ctc_kd", "cross_entropy", "decoder_kd", *OF_TEACHERS[2:], *OF_SPEAKERS)  # as they are listed


class TargetConfig(Section):
    """How teachers' posteriors are made and aggregated."""

    heard: Heard = Field("same_audio", description="which audio the teachers heard")
    aggregation: Aggregation = Field("logprob_mean", description="mean over teachers")
    weighting: Weighting = Field("uniform", description="weight of each teacher")
    asked: Asked = Field(
        "all",
        description="whose posteriors: all teachers'; only that of the recording's own speaker; or with the parent's",
    )
    best: int | None = Field(
        None, description="only so many teachers of the largest weights for each recording; 1: elitist; none: all", ge=1
    )
    spelled_only: bool = Field(False, description="keep a target only where the aggregate spells the prompt")
    coverage: Literal["strict", "partial", "all"] = Field(
        "all", description="recordings kept: those that all teachers cover, at least min_teachers, or any"
    )
    min_teachers: int = Field(10, description="with coverage partial", ge=1)
    top_k: int = Field(32, description="entries kept of each posterior; the rest is one mass", ge=1)


class StageConfig(Section):
    """One stage of training: how long, at which peak learning rate, with what frozen."""

    epochs: int = Field(35, ge=1, description="epochs of this stage (not counted from the start of the run)")
    peak_lr: float = Field(2e-4, gt=0, description="highest learning rate")
    freeze_encoder: bool = Field(False, description="encoder in eval mode, its outputs computed once and reused")
    freeze_layers: int | None = Field(
        None, description="first encoder layers frozen in this stage; none: train.freeze_layers", ge=0
    )


class CurriculumConfig(Section):
    """Easy recordings first: epochs keep their number of batches, drawn from the easiest share of the recordings."""

    schedule: Literal["none", "linear", "sqrt", "step"] = Field(
        "none", description="how the share grows to all, by epochs: none (all from the start), linear, sqrt, step"
    )
    start: float = Field(0.3, description="share of the recordings in the first epoch", gt=0, le=1)
    difficulty: Literal["parent", "duration", "targets", "random"] = Field(
        "parent",
        description="parent: loss of the weights that training starts from, measured once; duration: seconds; targets: "
        "-log probability of the text under the targets; random: a control",
    )


class TrainConfig(Section):
    """The one training loop."""

    stages: tuple[StageConfig, ...] = Field(
        (StageConfig(epochs=5, peak_lr=3e-4, freeze_encoder=True), StageConfig(epochs=35, peak_lr=2e-4)),
        description="run one after the other; a frozen stage needs an initialised encoder",
        min_length=1,
    )
    init: Path | None = Field(None, description="checkpoint to start from (the parent); none: from scratch")
    freeze_layers: int = Field(0, description="first encoder layers that never move (with the subsampling)", ge=0)
    batch_size: int = Field(8, description="recordings in a batch", ge=1)
    accumulate: int = Field(1, description="batches per update", ge=1)
    sampler: Literal["length", "words"] = Field(
        "length", description="batches of like length, or of few words by several speakers (XDED)"
    )
    speakers_per_word: int = Field(4, description="with sampler words: recordings of one word in a batch", ge=2)
    average: Literal["none", "ema", "last"] = Field(
        "none", description="weights that are tested and kept: the last, their moving average, the mean of the last"
    )
    ema_decay: float = Field(0.999, description="with average ema: share that is kept at each update", gt=0, lt=1)
    average_last: float = Field(
        0.25, description="with average last: share of the updates that is averaged, and that best.pt is of", gt=0, le=1
    )
    guide: Path | None = Field(None, description="recogniser whose encoder outputs feature_kd imitates (the parent)")
    curriculum: CurriculumConfig = CurriculumConfig()
    warmup_steps: int = Field(
        2_000, description="updates of linear warm-up per stage, capped at 10 % of the stage", ge=0
    )
    decay: Literal["constant", "cosine", "noam"] = Field("cosine", description="learning rate after the warm-up")
    weight_decay: float = Field(1e-2, description="of AdamW", ge=0)
    gradient_clip: float = Field(1.0, description="largest norm of the gradient", gt=0)
    validate_every_epochs: int = Field(1, description="epochs between validations", ge=1)
    save_every_steps: int = Field(200, description="updates between rewrites of latest.pt", ge=1)
    checkpoint_every_epochs: int = Field(10, description="epochs between kept checkpoints", ge=1)
    stop_on_collapse: bool = Field(
        True, description="end a run that says the same whatever it hears and stops learning"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    devices: int = Field(1, description="processes that share each batch, one a device, on each machine", ge=1)
    nodes: int = Field(1, description="machines; more than one are started with torchrun or srun", ge=1)
    precision: str = Field("32-true", description="Lightning precision: 32-true, bf16-mixed, 16-mixed")
    threads: int | None = Field(None, description="torch threads of a process; none: torch's own choice", ge=1)
    loggers: tuple[LoggerName, ...] = Field(
        (), description="tensorboard, mlflow (files), wandb (offline): also get what metrics.jsonl gets"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.devices * self.nodes > self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} cannot be shared by {self.devices * self.nodes} devices")
        return self

    def frozen_parts(self, stage: StageConfig) -> tuple[str, ...]:
        """Names of the recogniser's modules that a stage freezes."""
        if stage.freeze_encoder:
            return ("encoder",)
        count = self.freeze_layers if stage.freeze_layers is None else stage.freeze_layers
        layers = tuple(f"encoder.layers.{i}" for i in range(count))
        return ("encoder.subsampling", *layers) if layers else ()


class TeachConfig(Section):
    """Parent and teachers."""

    size: Literal["micro", "tiny", "small", "base"] | None = Field(
        None, description="named size of parent and teachers; none: the student's model"
    )
    rehearsal: float = Field(
        0.0, description="recordings of others that a teacher hears too, for each of its own speaker's", ge=0
    )
    controls: int | None = Field(None, description="control speakers that the parent hears; none: all", ge=1)
    parent_on: Literal["controls", "fold", "both"] = Field(
        "both", description="who the parent hears: control speakers, the fold's target speakers, or both"
    )
    parent: TrainConfig = Field(
        TrainConfig(stages=(StageConfig(epochs=40, peak_lr=1e-3),)), description="training of the parent"
    )
    teacher: TrainConfig = Field(
        TrainConfig(stages=(StageConfig(epochs=20, peak_lr=3e-4),)), description="adaptation of each teacher"
    )


class DecodeConfig(Section):
    """How outputs become text."""

    mode: Literal["ctc", "decoder"] = Field("ctc", description="head that is decoded")
    beam: int = Field(1, description="beam width; 1 is greedy", ge=1)
    max_length: int = Field(20, description="most tokens the decoder may write, without </s>", ge=1, le=511)
    word_list: bool = Field(False, description="score every listed word with both heads and take the best")
    ctc_weight: float = Field(0.5, description="weight of the CTC head in word-list scoring", ge=0, le=1)
    batch_size: int = Field(32, description="recordings decoded together", ge=1)


class Config(Section):
    """Everything that a run depends on besides the corpus."""

    corpus: Path | None = Field(None, description="manifest (JSON lines) or the folder that holds it")
    targets: Path | None = Field(None, description="folder of aggregated targets")
    seed: int = Field(0, description="of initialisation, order, dropout and augmentation", ge=0)
    fold: FoldConfig = FoldConfig()
    features: FeatureConfig = FeatureConfig()
    augment: AugmentConfig = AugmentConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    target: TargetConfig = TargetConfig()
    train: TrainConfig = TrainConfig()
    teach: TeachConfig = TeachConfig()
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("ctc_kd", "text_kd"):
            if getattr(self.objective, name) and self.target.heard == "same_prompt":
                raise ValueError(f"{name} needs heard: same_audio (frames of different recordings do not line up)")
        if self.fold.withhold and self.target.heard == "same_prompt":
            raise ValueError("fold.withhold needs heard: same_audio (same_prompt asks about withheld recordings)")
        self._check_time_axis()
        asked = self.objective.cross_entropy or self.objective.decoder_kd or self.decode.mode == "decoder"
        if self.model.decoder_layers == 0 and (asked or self.decode.ctc_weight < 1):
            raise ValueError(
                "model.decoder_layers 0 leaves no decoder to train or decode: set objective.cross_entropy and "
                "objective.decoder_kd to 0, decode.mode to ctc and decode.ctc_weight to 1"
            )
        return self

    def _check_time_axis(self) -> None:
        timed = [name for name in ("ctc_kd", "feature_kd") if getattr(self.objective, name)]
        for name in ("tempo", "speed", "dysarthria"):
            if getattr(self.augment, name) and timed:
                raise ValueError(f"augment.{name} moves frames away from cached targets; set it to 0 with {timed[0]}")
        apart = [name for name in OF_SPEAKERS[:2] if getattr(self.objective, name)]
        if apart and self.train.sampler != "words":
            raise ValueError(f"{apart[0]} needs several speakers of a word in a batch; set train.sampler to words")
        whole = [name for name in ("feature_kd", *OF_SPEAKERS) if getattr(self.objective, name)]
        if whole and self.train.devices * self.train.nodes > 1:
            raise ValueError(f"{whole[0]} needs whole batches on one device; set train.devices and train.nodes to 1")

    @property
    def stages_run(self) -> tuple[StageConfig, ...]:
        """The stages without those that a run from scratch leaves out: freezing a random encoder teaches nothing."""
        trained = self.train.init is not None or self.model.pretrained is not None
        return tuple(stage for stage in self.train.stages if trained or not stage.freeze_encoder)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Field names of the section that an error location points into."""
    section: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):
            section = StageConfig
            continue
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            section = StageConfig if part == "stages" else None
        if section is None:
            return []
    return list(section.model_fields)


def build(data: Mapping[str, Any], where: str) -> Config:
    """Validates a mapping into a `Config`.

    Raises:
        ConfigError: naming every wrong value, its place in `where`, and the nearest known key.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"]), 1)
                problems.append(f"unknown key '{place}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
            else:
                message = item["msg"].removeprefix("Value error, ")
                # a rule between several keys is given the whole config
                given = f" (given: {item.get('input')!r:.80})" if place else ""
                problems.append(f"{place or 'config'}: {message}{given}")
        raise ConfigError(
            f"{where}: " + "; ".join(problems) + ".", "Run 'xded train --help-config' for every key and its default."
        ) from error


def load(path: Path) -> Config:
    """Reads a YAML config; relative paths in it are taken from the working folder."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file.", "Check the path given with --config.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Give a YAML file with --config.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.", "Mend the line that is named.") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} holds no mapping of sections.", "Start from a run's config.yaml.")
    return build(data, str(path))


def override(config: Config, changes: Mapping[str, Any], where: str = "the command line") -> Config:
    """A config with dotted keys (`train.batch_size`) replaced; `None` values are skipped."""
    data = config.model_dump()
    if changes.get("model.size") is not None:
        # a new size brings its own numbers; of the old ones only those stay that no size sets (dropout)
        data["model"] = {key: value for key, value in data["model"].items() if key not in SIZES["tiny"]}
    for key, value in changes.items():
        if value is None:
            continue
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(
                    f"{where}: unknown key '{key}': '{parent}' is a value, not a section.", "Give the whole value."
                )
        section[last] = value
    return build(data, where)


def to_yaml(config: Config) -> str:
    """The whole tree, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
