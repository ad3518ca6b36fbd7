"""A student as two ONNX graphs: waveform to CTC head, and one cached step of the decoder.

Exported with `torch.onnx.export(dynamo=True)`; batch, length of the audio and length of the text are free.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xded.errors import CheckpointError, need_extra
from xded.exported import DECODER, ENCODER
from xded.models.decoder_step import DecoderStep
from xded.models.student import Student

OPSET = 20
TOLERANCE = 1e-3  # largest difference of a logit or log-probability between torch and onnxruntime
ENCODER_OUTPUTS = ("lengths", "ctc_log_probs", "encoded")
DECODER_INPUTS = ("tokens", "memory_keys", "memory_values", "lengths", "past_keys", "past_values")
DECODER_OUTPUTS = ("logits", "keys", "values")


class Hearing(nn.Module):
    """Waveforms to what both heads need: front end, encoder, CTC head, the decoder's keys and values of the audio."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.step = DecoderStep(student) if student.has_decoder else None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        return (*ENCODER_OUTPUTS, *(("memory_keys", "memory_values") if self.step else ()))

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, ...]:
        """Waveforms [B, N] and valid samples [B] to `outputs`.

        Valid frames [B], CTC log-probabilities [B, T', V], encoded frames [B, T', D], keys and values
        [layers, B, heads, T', D / heads].
        """
        encoded, lengths = self.student.encode(*self.student.front_end(waveforms, samples))
        memory = self.step.remember(encoded) if self.step else ()
        return lengths, self.student.ctc_logits(encoded).log_softmax(-1), encoded, *memory


def write_onnx(student: Student, folder: Path) -> tuple[str, ...]:
    """Writes `encoder.onnx` and, when there is a decoder, `decoder.onnx`; returns their names.

    Raises:
        CheckpointError: onnxruntime does not say what torch says.
        ConfigError: a package of the extra `onnx` is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need_extra(package, "onnx", "Export to ONNX")
    student.eval()
    hearing = Hearing(student)
    rate = student.front_end.sample_rate
    inputs = torch.zeros(2, rate), torch.tensor([rate, rate // 2])
    audio = ({0: "batch", 1: "samples"}, {0: "batch"})
    _export(hearing.eval(), inputs, audio, ("waveforms", "samples"), hearing.outputs, folder / ENCODER)
    if hearing.step is None:
        return (ENCODER,)
    with torch.no_grad():
        lengths, _, _, *memory = hearing(*inputs)
        step = DecoderStep(student).eval()
        past = [part[:, :, :, :3].clone() for part in memory]  # any keys will do: only their shape counts
        token = torch.ones(2, 1, dtype=torch.long)
    kept, heard = {1: "batch", 3: "past"}, {1: "batch", 3: "frames"}
    shapes = ({0: "batch"}, heard, heard, {0: "batch"}, kept, kept)
    _export(step, (token, *memory, lengths, *past), shapes, DECODER_INPUTS, DECODER_OUTPUTS, folder / DECODER)
    return ENCODER, DECODER


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: Sequence[Mapping[int, str]],
    names: Sequence[str],
    outputs: Sequence[str],
    path: Path,
) -> None:
    """One graph. `shapes` names the free dimensions of each input."""
    # the fused attention kernels leave strides that the exporter cannot follow
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=tuple(shapes),
            input_names=names,
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
    program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def difference(student: Student, folder: Path, *, seed: int = 0) -> float:
    """Largest difference between onnxruntime and torch: CTC log-probabilities of valid frames, decoder logits.

    On noise, in batches of 1 and 3, padded to different lengths.

    Raises:
        CheckpointError: it is above `TOLERANCE`.
    """
    runtime: Any = need_extra("onnxruntime", "onnx", "Export to ONNX")
    generator = torch.Generator().manual_seed(seed)
    encoder = runtime.InferenceSession(folder / ENCODER)
    decoder = runtime.InferenceSession(folder / DECODER) if student.has_decoder else None
    worst = 0.0
    for seconds in ((0.73,), (1.9, 0.5, 1.2)):
        samples = (torch.tensor(seconds) * student.front_end.sample_rate).long()
        waveforms = 0.1 * torch.randn(len(samples), int(samples.max()), generator=generator)
        encoded, lengths = student.encode(*student.front_end(waveforms, samples))
        wanted = student.ctc_logits(encoded).log_softmax(-1)
        got_lengths, log_probs, _, *memory = encoder.run(
            None, {"waveforms": waveforms.numpy(), "samples": samples.numpy()}
        )
        for row, length in enumerate(lengths.tolist()):
            far = torch.from_numpy(log_probs[row, :length]) - wanted[row, :length]
            worst = max(worst, float(far.abs().max()) if got_lengths[row] == length else torch.inf)
        if decoder is not None:
            tokens = torch.randint(student.vocabulary, (len(samples), 5), generator=generator)
            logits = student.decoder_logits(tokens, encoded, lengths)
            worst = max(worst, _steps_apart(decoder, tokens, memory, got_lengths, logits))
    if not worst <= TOLERANCE:
        raise CheckpointError(
            f"onnxruntime differs from torch by up to {worst:.2g} in a logit; {TOLERANCE:g} is allowed.",
            "Export without ONNX graphs (--no-onnx), and report the checkpoint's config.",
        )
    return worst


def _steps_apart(decoder: Any, tokens: Tensor, memory: list[Any], lengths: Any, wanted: Tensor) -> float:
    """Largest difference of the logits of the steps through tokens [B, U] from the wanted ones [B, U, V]."""
    keys, values = (part[:, :, :, :0] for part in memory)
    worst = 0.0
    for step in range(tokens.shape[1]):
        inputs = (tokens[:, step : step + 1].numpy(), *memory, lengths, keys, values)
        logits, keys, values = decoder.run(DECODER_OUTPUTS, dict(zip(DECODER_INPUTS, inputs, strict=True)))
        worst = max(worst, float((torch.from_numpy(logits) - wanted[:, step]).abs().max()))
    return worst
