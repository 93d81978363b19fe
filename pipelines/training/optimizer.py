"""AdamW that skips steps whose gradients are not finite, and its learning rate schedule."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.training.config import Optimizer


def learning_rate_factor(config: Optimizer, images: int, total: int) -> float:
    """Return the factor of the base learning rate: linear warm-up, then constant or a cosine that falls to 0.

    Args:
        config: gives `warmup` and `schedule`.
        images: images seen before the step.
        total: images of the whole training.

    Returns:
        (images + 1) / (warmup + 1) during the warm-up; afterwards 1, or 0.5 + 0.5 cos(pi * progress).
    """
    if images < config.warmup:
        return (images + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (images - config.warmup) / max(1, total - config.warmup)
    return 0.5 + 0.5 * float(np.cos(np.pi * min(1.0, progress)))


class Adam:
    """AdamW that skips a step, with no change to weights or moments, if a gradient is NaN or infinite.

    The host does not wait for the device: the fused kernel reads on the device whether to skip, as it does with a
    GradScaler. Gradients are the same on all ranks, so all ranks skip the same steps.

    Args:
        model: the module whose trainable parameters are optimized.
        config: learning rate, betas, weight decay and the limit of the gradient norm (`clip`; 0: none).
        lr: learning rate in place of `config.lr`.
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
        """Update the weights from their gradients, then clear the gradients.

        Args:
            lr: learning rate of this step.

        Returns:
            `gradient_norm`, the norm before clipping, and `skipped_steps`, 1 if this step was skipped and else 0.
        """
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
        """Return the longest series of skipped steps since the last call.

        A series that is still going on at one call is counted in full at the next call too.
        """
        longest, self._longest = int(self._longest), self._streak
        return longest

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped torch.optim.AdamW."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load only the moments and step counts.

        Learning rate, betas and weight decay stay as configured, since the state may come from another run.
        """
        groups = zip(state["param_groups"], self._optimizer.param_groups, strict=True)
        state = state | {"param_groups": [own | {"params": theirs["params"]} for theirs, own in groups]}
        self._optimizer.load_state_dict(state)
        for parameter, moments in self._optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the fused kernel assumes the same memory format as the weights
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
