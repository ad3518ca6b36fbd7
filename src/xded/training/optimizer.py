"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) whose clipping takes no pass over the gradients of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(part: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases, norms and embeddings' scale."""
    matrices = [p for p in part.parameters() if p.dim() > 1]
    vectors = [p for p in part.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with the design's betas.

    Args:
        parts: what is trained. The gradient of each part is clipped by itself.
        weight_decay: of matrices.
        lr: learning rate, until it is set.
    """

    def __init__(self, parts: list[nn.Module], weight_decay: float, lr: float = 0.0) -> None:
        of_parts = [[group for group in parameter_groups(part, weight_decay) if group["params"]] for part in parts]
        groups = [group for of_part in of_parts for group in of_part]
        super().__init__(groups, lr=lr, betas=(0.9, 0.98), eps=1e-9, fused=True)
        self.part_of_group = [number for number, of_part in enumerate(of_parts) for _ in of_part]
        self.excess: dict[int, Tensor | None] = {}
        self.lists: dict[int, tuple[list[bool], list[list[Tensor]]]] = {}
        self._step_supports_amp_scaling = False  # the loss scaler of 16-mixed divides before the norm is taken

    def clip(self, part: int, most: float) -> Tensor:
        """The norm of a part's gradient; where it is above `most`, the next step divides by what it is too long."""
        pairs = zip(self.param_groups, self.part_of_group, strict=True)
        parameters = [p for group, of in pairs if of == part for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.excess[part] = norm / most if norm > most else None  # also after a step that the loss scaler left out
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, in one pass."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, (group, part) in enumerate(zip(self.param_groups, self.part_of_group, strict=True)):
            lists = self._trained(number, group)
            if not lists[0]:
                continue
            for count in set(lists[5]):
                count += 1
            torch._fused_adamw_(
                *lists, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                weight_decay=group["weight_decay"], amsgrad=False, maximize=False, grad_scale=self.excess.get(part),
            )  # fmt: skip
        self.excess.clear()
        return loss

    def _trained(self, number: int, group: dict[str, Any]) -> list[list[Tensor]]:
        """Parameters that have a gradient, gradients, means, squares, (of AMSGrad,) counts of their updates.

        Only the gradients are new in each step. Counts that are equal are one tensor, until others have a gradient.
        """
        gradients = [p.grad for p in group["params"]]
        having = [gradient is not None for gradient in gradients]
        if number not in self.lists or self.lists[number][0] != having:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            counts: dict[float, Tensor] = {}
            for parameter, count in zip(lists[0], lists[5], strict=True):
                self.state[parameter]["step"] = counts.setdefault(float(count), count.clone())
            lists[1], lists[5] = [], [self.state[parameter]["step"] for parameter in lists[0]]
            self.lists[number] = having, lists
        parameters, _, *others = self.lists[number][1]
        return [parameters, [gradient for gradient in gradients if gradient is not None], *others]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lists = {}
