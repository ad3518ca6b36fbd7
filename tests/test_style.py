"""Statistics of early features: mixed between the recordings of a batch, or taken away from each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exported_model import random_student
from made_hugging_face import write_ctc
from tiny_corpus import MODEL, job_for, write_corpus
from xded.config import FeatureConfig, ModelConfig
from xded.errors import ConfigError
from xded.export.onnx import difference, write_onnx
from xded.features import valid_mask
from xded.models.checkpoints import load
from xded.models.pretrained import fitted
from xded.models.student import Student
from xded.models.style import mix_style, statistics, whiten
from xded.training.run import fit

LENGTHS = [37, 80, 61]


def student(whiten_layers: int = 0, mixing: float = 0.0) -> Student:
    torch.manual_seed(0)
    sizes = {**MODEL, "encoder_layers": 3, "dropout": 0.0, "whiten_layers": whiten_layers}
    made = Student(ModelConfig.model_validate(sizes), 7, FeatureConfig(mels=16))
    made.encoder.mixing = mixing  # type: ignore[assignment]
    return made


def ragged(padding: int = 0) -> Tensor:
    features = torch.randn(3, 80, 16, generator=torch.Generator().manual_seed(1))
    features = torch.where(valid_mask(torch.tensor(LENGTHS), 80)[:, :, None], features, 0.0)
    return torch.cat([features, torch.zeros(3, padding, 16)], dim=1)


def hidden(padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """[3, 20, 5] of different means and deviations, and what is valid of it."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 20, 5, generator=generator) * torch.tensor([1.0, 4.0, 0.3])[:, None, None]
    mask = valid_mask(torch.tensor([7, 20, 13]), 20)
    values = values + torch.arange(3.0)[:, None, None]
    return torch.where(mask[:, :, None], values, padding), mask


def test_statistics_are_those_of_the_valid_frames() -> None:
    values, mask = hidden(padding=1e3)
    mean, deviation = statistics(values, mask)
    for row, frames in enumerate((7, 20, 13)):
        valid = values[row, :frames]
        torch.testing.assert_close(mean[row, 0], valid.mean(0))
        torch.testing.assert_close(deviation[row, 0], valid.std(0, correction=0), rtol=1e-5, atol=1e-5)


def test_whitened_features_have_no_mean_and_unit_variance_whatever_the_padding() -> None:
    values, mask = hidden()
    mean, deviation = statistics(whiten(values, mask), mask)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(deviation, torch.ones_like(mean), rtol=1e-4, atol=0)
    torch.testing.assert_close(whiten(hidden(padding=1e3)[0], mask)[mask], whiten(values, mask)[mask])


def test_whitening_forgets_how_loud_and_how_high_a_channel_is() -> None:
    values, mask = hidden()
    changed = values * torch.tensor([2.0, 0.5, 3.0])[:, None, None] + 7.0
    torch.testing.assert_close(whiten(changed, mask)[mask], whiten(values, mask)[mask], rtol=1e-3, atol=1e-3)


def test_one_frame_is_whitened_to_zero() -> None:
    assert whiten(torch.full((1, 3, 2), 5.0), torch.tensor([[True, False, False]]))[0, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("layers", [1, 3])
def test_a_padded_batch_of_a_whitened_student_is_its_single_recordings(layers: int) -> None:
    made = student(layers).eval()
    together, lengths = made.encode(ragged(padding=13), torch.tensor(LENGTHS))
    for row, frames in enumerate(LENGTHS):
        alone, (kept,) = made.encode(ragged()[row : row + 1, :frames], torch.tensor([frames]))
        torch.testing.assert_close(together[row, : lengths[row]], alone[0, :kept], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, student().eval().encode(ragged(padding=13), torch.tensor(LENGTHS))[0])


def test_whitening_has_no_parameters_and_is_done_in_training_too() -> None:
    assert student(2).state_dict().keys() == student().state_dict().keys()
    encoded, lengths = student(3).train().encode(ragged(), torch.tensor(LENGTHS))
    mean, _ = statistics(encoded, valid_mask(lengths, encoded.shape[1]))
    assert mean.abs().max() < 1e-5


def test_mixed_style_is_between_that_of_two_recordings() -> None:
    values, mask = hidden()
    torch.manual_seed(0)
    mixed = mix_style(values, mask)
    before, after = statistics(values, mask), statistics(mixed, mask)
    for one, other in zip(before, after, strict=True):
        assert (other >= one.amin(0) - 1e-4).all()
        assert (other <= one.amax(0) + 1e-4).all()
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(whiten(mixed, mask)[mask], whiten(values, mask)[mask], rtol=1e-3, atol=1e-3)
    # one lambda a recording, for mean and deviation: 4 equations, and the same answer in all channels
    shares = [(after[0][0] - before[0][o]) / (before[0][0] - before[0][o]) for o in (1, 2)]
    assert min(float(share.std()) for share in shares) < 1e-3


def test_mixing_reads_no_padding_and_gives_statistics_no_gradient() -> None:
    values, mask = hidden()
    mixes = []
    for padded in (values, hidden(padding=1e3)[0]):
        torch.manual_seed(0)
        mixes.append(mix_style(padded, mask)[mask])
    torch.testing.assert_close(*mixes)
    values.requires_grad_()
    torch.manual_seed(0)
    mixed, weight = mix_style(values, mask), torch.randn(values.shape, generator=torch.Generator().manual_seed(4))
    gradient = torch.autograd.grad((weight * mixed)[mask].sum(), values)[0]
    slope = statistics(mixed, mask)[1] / statistics(values, mask)[1]  # gamma / sigma: constants
    torch.testing.assert_close(gradient, slope * weight * mask[:, :, None], rtol=1e-3, atol=1e-4)


def test_a_recording_alone_has_nobody_to_mix_with() -> None:
    values, mask = hidden()
    torch.testing.assert_close(mix_style(values[1:2], mask[1:2]), values[1:2])


def test_mixing_is_for_training_and_for_a_share_of_the_batches() -> None:
    plain = student().train().encode(ragged(), torch.tensor(LENGTHS))[0]
    made = student(mixing=0.5).train()
    same = [torch.equal(made.encode(ragged(), torch.tensor(LENGTHS))[0], plain) for _ in range(60)]
    assert 15 < sum(same) < 45
    never = student(mixing=1.0).eval().encode(ragged(), torch.tensor(LENGTHS))[0]
    assert torch.equal(never, student().eval().encode(ragged(), torch.tensor(LENGTHS))[0])
    off = student().train()
    state = torch.random.get_rng_state()
    off.encode(ragged(), torch.tensor(LENGTHS))
    assert torch.equal(torch.random.get_rng_state(), state)  # switched off, it draws nothing


def test_a_whitened_student_is_exported_as_it_is(tmp_path: Path) -> None:
    made = random_student(9, encoder_layers=2, whiten_layers=1)
    write_onnx(made, tmp_path)
    assert difference(made, tmp_path) < 1e-3
    plain = random_student(9, encoder_layers=2)
    with pytest.raises(Exception, match="onnxruntime differs"):
        difference(plain, tmp_path)


STEPS = {"stages": [{"epochs": 2, "peak_lr": 1e-3}]}


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_a_run_mixes_when_asked(tmp_path: Path, mixing: float) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    states = []
    for name, augment in (("plain", {}), ("mixed", {"mix_style": mixing})):
        fit(job_for(corpus, tmp_path / name, train=STEPS, augment=augment), quiet=True)
        states.append(load(tmp_path / name / "latest.pt")["model_state_dict"])
    one, two = states
    assert all(one[name].equal(two[name]) for name in one) == (mixing == 0.0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {**MODEL, "whiten_layers": 2}}, r"whiten_layers is 2, and the encoder has 1 layers.*at most 1"),
        (
            {"model": {**MODEL, "whiten_layers": 1}, "augment": {"mix_style": 0.5}},
            r"takes away the statistics that augment.mix_style mixes.*one of the two to 0",
        ),
    ],
)
def test_what_cannot_be_changed_is_refused(tmp_path: Path, sections: dict, message: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=message):
        fit(job_for(corpus, tmp_path / "run", **sections), quiet=True)


@pytest.mark.parametrize("section", ["model.whiten_layers", "augment.mix_style"])
def test_a_hugging_face_encoder_is_left_as_it_is(tmp_path: Path, section: str) -> None:
    write_ctc(tmp_path / "theirs", "wav2vec2")
    name, key = section.split(".")
    sections = {"model": {**MODEL, "pretrained": tmp_path / "theirs"}}
    sections[name] = {**sections.get(name, {}), key: 1}
    job = job_for(write_corpus(tmp_path / "corpus"), tmp_path / "run", **sections)
    job.config = fitted(job.config)
    with pytest.raises(ConfigError, match=rf"{section} is 1, and a Hugging Face encoder.*Set {section}=0"):
        fit(job, quiet=True)
