"""AdamW that skips steps with gradients that are not finite, and the schedule of its learning rate."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.training.config import Optimizer


def learning_rate_factor(config: Optimizer, images: int, total: int) -> float:
    """Of the base rate at a step that begins after `images`: linear warm-up, then constant or a cosine to 0."""
    if images < config.warmup:
        return (images + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (images - config.warmup) / max(1, total - config.warmup)
    return 0.5 + 0.5 * float(np.cos(np.pi * min(1.0, progress)))


class Adam:
    """AdamW that leaves the weights, and its own state, as they are where a gradient is NaN or infinite.

    Nothing waits for the device to tell: the optimizer's kernel reads the verdict there, as it does from a GradScaler.
    Gradients are the same on all ranks, and so is the verdict.
    """

    def __init__(self, model: nn.Module, config: Optimizer, lr: float | None = None):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clip = config.clip
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=lr or config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        device = self._parameters[0].device
        self._streak, self._longest = torch.zeros(2, device=device).unbind()

    def step(self, lr: float) -> dict[str, Tensor]:
        """One update at this rate. Returns the norm of the gradient before clipping, and whether it was skipped."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm, foreach=True)
        bad = (~norm.isfinite()).float()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.found_inf = bad  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._streak = (self._streak + bad) * bad
        self._longest = torch.maximum(self._longest, self._streak)
        return {"gradient_norm": norm, "skipped_steps": bad}

    def skipped(self) -> int:
        """The longest run of skipped steps since the last call, and up to it."""
        longest, self._longest = int(self._longest), self._streak
        return longest

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moments only: rate, betas and decay stay this optimizer's, which may go on from another run's."""
        groups = zip(state["param_groups"], self._optimizer.param_groups, strict=True)
        state = state | {"param_groups": [own | {"params": theirs["params"]} for theirs, own in groups]}
        self._optimizer.load_state_dict(state)
        for parameter, moments in self._optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the fused kernel takes them to lie in memory as the weights do
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
