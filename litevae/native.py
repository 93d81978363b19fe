"""CPU kernels for inference in fp32: 3x3 convolutions by Winograd's algorithm, and group normalisation fused with SiLU.

`accelerate` puts them into a model that is only run, not trained. They are written in C++ (native.cpp). At first use
they are compiled for this machine, which takes seconds and needs a C++ compiler ($CXX, or g++), and are kept in
~/.cache/litevae. Their results equal those of PyTorch's layers to 1e-5 of the largest value (tested).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.layers import ResBlock

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")

Module = TypeVar("Module", bound=nn.Module)


class NoKernels(UserError):
    """The kernels can't be compiled or loaded on this machine."""


def available() -> bool:
    """Return whether the kernels exist or can be compiled."""
    try:
        _library()
    except NoKernels:
        return False
    return True


def accelerate(model: Module) -> Module:
    """Replace the 3x3 convolutions and residual blocks within a model by faster ones with equal output, in place.

    This is for inference: no gradient flows through the new layers, and they do not see later changes of the weights.

    Returns:
        The same model.

    Raises:
        NoKernels: if the kernels can't be compiled or loaded on this machine.
        ValueError: if the model is not in fp32 on a CPU.
    """
    _library()
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("the kernels are for models in fp32 on a CPU")
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    _replace(model)
    return model


def _replace(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, ResBlock) and isinstance(child.norm1, nn.GroupNorm) and isinstance(child.conv1, nn.Conv2d):
            setattr(model, name, FastResBlock(child))
        elif _replaceable(child):
            setattr(model, name, FastConv2d(child))  # type: ignore[arg-type]
        else:
            _replace(child)


class FastConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1: (N, C, H, W) -> (N, O, H, W), channels last in memory.

    It shares its parameters with `conv`, but it computes with the values that they have at construction.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        weight = self.weight.detach().contiguous()
        sizes = _ints(self.in_channels, self.out_channels)
        self.packed = torch.empty(_library().packed_size(*sizes))  # not a buffer, to keep it out of state dicts
        _library().pack(_data(weight), *sizes, _data(self.packed))

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the convolution of `x`, plus `added` if it is given."""
        x = _usable(x)
        n, _, h, w = x.shape
        y = torch.empty((n, self.out_channels, h, w), memory_format=torch.channels_last)
        sizes = _ints(n, h, w, self.in_channels, self.out_channels)
        added = None if added is None else _usable(added)
        if _library().convolve(_data(x), _data(self.packed), _data(self.bias), _data(added), _data(y), *sizes):
            raise MemoryError(f"no memory for a convolution of {n} x {h} x {w} pixels")
        return y


class FastResBlock(nn.Module):
    """A ResBlock with group normalisation that passes over memory only for normalisations and convolutions."""

    def __init__(self, block: ResBlock):
        super().__init__()
        assert isinstance(block.norm1, nn.GroupNorm)
        assert isinstance(block.norm2, nn.GroupNorm)
        self.norm1, self.norm2, self.skip = block.norm1, block.norm2, block.skip
        self.conv1, self.conv2 = FastConv2d(block.conv1), FastConv2d(block.conv2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = _usable(x)
        h = self.conv1(norm_silu(x, self.norm1))
        norm_silu(h, self.norm2, out=h)
        return self.conv2(h, added=self._skipped(x))

    def _skipped(self, x: Tensor) -> Tensor:
        if isinstance(self.skip, nn.Identity):
            return x
        assert isinstance(self.skip, nn.Conv2d)
        # With channels last in memory, a 1x1 convolution is a matrix product.
        return F.linear(x.permute(0, 2, 3, 1), self.skip.weight.flatten(1), self.skip.bias).permute(0, 3, 1, 2)


def norm_silu(x: Tensor, norm: nn.GroupNorm, out: Tensor | None = None) -> Tensor:
    """Apply group normalisation and SiLU to (N, C, H, W), fp32, channels last in memory. `out` may be `x`."""
    n, c, h, w = x.shape
    out = torch.empty_like(x) if out is None else out
    scale, shift, eps = norm.weight, norm.bias, ctypes.c_float(norm.eps)
    sizes = _ints(n, h * w, c, norm.num_groups)
    _library().normalise(_data(x), _data(scale), _data(shift), _data(out), *sizes, eps, ctypes.c_int(1))
    return out


def _replaceable(module: nn.Module) -> bool:
    """Return whether a layer is a convolution that `FastConv2d` can compute."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.padding_mode == "zeros"
        and module.groups == 1
    )


def _usable(x: Tensor) -> Tensor:
    """Convert a tensor to what the kernels take: fp32, channels last in memory."""
    return x.float().contiguous(memory_format=torch.channels_last)


def _data(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _ints(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))


# --- compiling ----------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL:
    """Load the compiled kernels; compile them first if needed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or ""
    if not compiler:
        raise NoKernels("there is no C++ compiler: install g++, or name one in CXX")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoKernels(f"the C++ compiler {compiler} does not run: {error}") from None
    # The name depends on the processor: -march=native means something else on another machine, and the two may share a
    # home folder.
    about = [SOURCE.read_text(), compiler, version, *FLAGS, platform.machine(), *_features()]
    name = f"native-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:32]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litevae"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / name).is_file():
            _compile(compiler, folder / name)
        library = ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise NoKernels(f"{folder / name}: {error}") from None
    library.packed_size.restype = ctypes.c_int64
    return library


def _compile(compiler: str, path: Path) -> None:
    """Compile the kernels in a temporary folder, then move the result to its place, so that it is never incomplete."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
        made = os.path.join(folder, path.name)
        done = subprocess.run([compiler, *FLAGS, "-shared", str(SOURCE), "-o", made], capture_output=True, text=True)
        if done.returncode:
            raise NoKernels(f"{compiler} could not compile {SOURCE}: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(made, path)


def _features() -> list[str]:
    """Return the line of /proc/cpuinfo that lists the features of this processor."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else [platform.processor()]
    return next(([line] for line in lines if line.lower().startswith(("flags", "features"))), lines[:1])
