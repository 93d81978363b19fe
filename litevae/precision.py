"""The precision that a device computes in."""

from contextlib import AbstractContextManager

import torch


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """Return a context manager for the precision: autocast to bfloat16, or no autocast.

    Args:
        device: The device.
        precision: "fp32", "bf16", or "auto". "auto" is bf16 if the hardware can multiply it (GPUs from Ampere on, CPUs
            with AMX), and fp32 otherwise.
    """
    kind = torch.device(device).type
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else _cpu_has_amx()
        precision = "bf16" if fast else "fp32"
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16")


def _cpu_has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
