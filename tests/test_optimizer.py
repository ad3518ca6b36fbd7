"""AdamW that clips in its own pass, against torch's AdamW and clip_grad_norm_."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from xded.training.optimizer import AdamW, parameter_groups


def two_parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)), nn.Linear(7, 2)


def loss_of(first: nn.Module, second: nn.Module, update: int) -> Tensor:
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(update))
    inner = first(values)
    return 10.0 ** (1 - update) * (second(inner.detach()).square().sum() + 9.0 * inner.square().sum())


def reference_for(first: nn.Module, second: nn.Module) -> torch.optim.AdamW:
    groups = parameter_groups(first, 0.1) + parameter_groups(second, 0.1)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9)


def test_updates_are_those_of_torch_after_clipping_each_part() -> None:
    """Some are frozen now and then: the counts of their updates differ, within a part and between parts."""
    ours, plain = two_parts(), two_parts()
    optimizer, reference = AdamW(list(ours), 0.1), reference_for(*plain)
    clipped = []
    for update in range(8):  # the gradient becomes small: not all are clipped
        for each, parts in ((optimizer, ours), (reference, plain)):
            each.zero_grad()
            parts[0].get_submodule("0").requires_grad_(update not in (2, 3, 5))
            parts[1].requires_grad_(update not in (0, 4))
            for group in each.param_groups:
                group["lr"] = 0.01 / (update + 1)
            loss_of(*parts, update).backward()
        for part, module in enumerate(plain):
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            torch.testing.assert_close(optimizer.clip(part, 1.0), norm)
            clipped.append(bool(norm > 1.0))
        optimizer.step()
        reference.step()
        if update == 5:  # as a run that is resumed
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AdamW(list(ours), 0.1)
            optimizer.load_state_dict(state)
        for own, other in zip(nn.ModuleList(ours).parameters(), nn.ModuleList(plain).parameters(), strict=True):
            torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)
    counts = [[float(optimizer.state[p]["step"]) for p in part.parameters()] for part in ours]
    assert counts == [[5.0, 5.0, 8.0, 8.0], [6.0, 6.0]]
    assert set(clipped[::2]) == set(clipped[1::2]) == {False, True}


def test_a_state_that_is_put_back_in_the_same_optimiser_counts() -> None:
    ours, plain = two_parts(), two_parts()
    optimizer = AdamW(list(ours), 0.1, lr=0.01)
    loss_of(*ours, 1).backward()
    optimizer.step()
    weights, state = (copy.deepcopy(each.state_dict()) for each in (nn.ModuleList(ours), optimizer))
    optimizer.step()
    after = copy.deepcopy(ours[0].state_dict())
    nn.ModuleList(ours).load_state_dict(weights)
    optimizer.load_state_dict(state)
    optimizer.step()
    assert all(torch.equal(after[name], value) for name, value in ours[0].state_dict().items())
    assert all(not torch.equal(after[name], value) for name, value in plain[0].state_dict().items())


def test_gradients_are_given_back() -> None:
    first, second = two_parts()
    optimizer = AdamW([first, second], 0.1, lr=0.01)
    loss_of(first, second, 1).backward()
    held = [weakref.ref(p.grad) for p in first.parameters() if p.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    assert [gradient() for gradient in held] == [None] * 4


def test_a_step_takes_the_gradients_of_its_closure_and_the_clipping_in_it() -> None:
    first, second = two_parts()
    plain = copy.deepcopy(first)
    optimizer = AdamW([first, second], 0.0, lr=0.1)

    def closure() -> Tensor:
        loss = loss_of(first, second, 0)
        loss.backward()
        optimizer.clip(0, 1e-8)  # about AdamW's epsilon: steps become shorter
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    moved = [float((own - other).detach().abs().max()) for own, other in zip(
        first.parameters(), plain.parameters(), strict=True
    )]  # fmt: skip
    assert 0 < max(moved) < 0.0999
    assert not optimizer.excess  # the next step is not clipped unless it is asked to


def test_parts_without_gradients_stay_and_a_gradient_that_is_no_number_is_told() -> None:
    first, second = two_parts()
    before = copy.deepcopy(first.state_dict())
    optimizer = AdamW([first, second], 0.1, lr=0.1)
    second(torch.full((1, 7), torch.nan)).sum().backward()
    assert optimizer.clip(0, 1.0) == 0.0
    assert optimizer.clip(1, 1.0).isnan()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items())


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_with_a_loss_scaler_the_norm_is_that_of_the_unscaled_gradient(scale: float) -> None:
    first, second = two_parts()
    optimizer = AdamW([first, second], 0.0, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(loss_of(first, second, 1)).backward()
    scaler.unscale_(optimizer)
    norm = float(optimizer.clip(0, 1.0))
    scaler.step(optimizer)
    scaler.update()
    plain, beside = two_parts()
    loss_of(plain, beside, 1).backward()
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)), rel=1e-5)
    torch.optim.AdamW(parameter_groups(plain, 0.0), lr=0.1, betas=(0.9, 0.98), eps=1e-9).step()
    for own, other in zip(first.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_a_loss_scaler_leaves_out_an_update_that_overflows() -> None:
    first, second = two_parts()
    before = copy.deepcopy(first.state_dict())
    optimizer, scaler = AdamW([first, second], 0.0, lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(first, second, 1)).backward()
    for parameter in first.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.unscale_(optimizer)
    assert optimizer.clip(0, 1.0) == torch.inf
    scaler.step(optimizer)
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items())
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(loss_of(first, second, 1)).backward()  # the next one is not clipped by the norm of the one left out
    scaler.unscale_(optimizer)
    optimizer.clip(0, 1e9)
    scaler.step(optimizer)
    assert all(not torch.equal(before[name], value) for name, value in first.state_dict().items())


def test_a_loss_scaler_takes_the_gradients_as_they_are() -> None:
    """Without `unscale_`: it does that itself, as the optimiser says that it does not."""
    first, second = two_parts()
    before = copy.deepcopy(first.state_dict())
    optimizer, scaler = AdamW([first, second], 0.0, lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(torch.inf * loss_of(first, second, 1)).backward()
    scaler.step(optimizer)
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items())


def test_its_state_is_that_of_torch() -> None:
    first, second = two_parts()
    optimizer = AdamW([first, second], 0.1, lr=0.1)
    loss_of(first, second, 1).backward()
    optimizer.step()
    reference = reference_for(first, second)
    reference.load_state_dict(optimizer.state_dict())
    again = AdamW([first, second], 0.1)
    again.load_state_dict(reference.state_dict())
    assert [float(again.state[p]["step"]) for p in nn.ModuleList([first, second]).parameters()] == [1.0] * 6
    assert again.param_groups[0]["lr"] == 0.1
