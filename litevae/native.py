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
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.layers import ResBlock

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")

CASTABLE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of inputs; the cast to fp32 is exact

Module = TypeVar("Module", bound=nn.Module)


class NoKernels(UserError):
    """The kernels can't be compiled or loaded on this machine."""


def available() -> bool:
    """Return whether the kernels exist or can be compiled."""
    return not unavailable()


def unavailable() -> str:
    """Return why the kernels can't be had on this machine, and what to do; "" if they can."""
    try:
        _library()
    except NoKernels as error:
        return str(error)
    return ""


def accelerate(model: Module) -> Module:
    """Replace the 3x3 convolutions and residual blocks within a model by faster ones with equal output, in place.

    This is for inference: no gradient flows through the new layers, and they refuse inputs and weights that ask for
    one. They compute in fp32 whatever autocast says: fp16 and bf16 inputs are cast, other dtypes are refused. When
    weights change (`load_state_dict`, an optimizer's step, an assignment), the next call uses the new ones; only a
    write through `weight.data` at the same address stays unnoticed. Weights that are no longer fp32 on a CPU are
    refused. Copies and pickles of the model work, and state dicts stay as they are.

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
    """A 3x3 convolution of stride 1 and padding 1: (N, C, H, W) -> (N, O, H, W), fp32, channels last in memory.

    It shares its parameters with `conv`. Only weights that were made in inference mode are copied, because PyTorch
    does not count their changes.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = _tracked(conv.weight), _tracked(conv.bias)  # type: ignore[assignment]
        self._packed: tuple[Tensor, int, Tensor] | None = None
        self._weights()

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the convolution of `x`, plus `added` if it is given.

        Raises:
            ValueError: if a tensor is not what the kernels can read: wrong shape, device or dtype, or with a gradient.
        """
        x = _usable(x, "the input", (None, self.in_channels, None, None))
        packed = self._weights()
        bias = None if self.bias is None else _parameter(self.bias, "the bias", (self.out_channels,))
        n, _, h, w = x.shape
        if not h or not w:
            raise ValueError(f"the input has no pixels: {tuple(x.shape)}")
        y = torch.empty((n, self.out_channels, h, w), memory_format=torch.channels_last, dtype=torch.float32)
        added = None if added is None else _usable(added, "what is added", tuple(y.shape))
        sizes = _ints(n, h, w, self.in_channels, self.out_channels)
        if n and _library().convolve(_data(x), _data(packed), _data(bias), _data(added), _data(y), *sizes):
            raise MemoryError(f"no memory for a convolution of {n} x {h} x {w} pixels")
        return y

    def _weights(self) -> Tensor:
        """Return the weights as the kernel reads them; they are computed anew if the parameter has changed."""
        if self.weight.is_inference():  # assigned or copied in inference mode
            self.weight = _tracked(self.weight)  # type: ignore[assignment]
        weight = _parameter(self.weight, "the weight", (self.out_channels, self.in_channels, 3, 3))
        if self._packed is not None:
            seen, version, packed = self._packed
            if seen.data_ptr() == self.weight.data_ptr() and version == self.weight._version:
                return packed
        sizes = _ints(self.in_channels, self.out_channels)
        packed = torch.empty(_library().packed_size(*sizes), dtype=torch.float32, device="cpu")
        _library().pack(_data(weight), *sizes, _data(packed))
        # The detached tensor keeps the memory, so that no other weights can get the same address.
        self._packed = self.weight.detach(), self.weight._version, packed
        return packed

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed weights: their layout depends on the processor, and a copy makes its own."""
        return self.__dict__ | {"_packed": None}


class FastResBlock(nn.Module):
    """A ResBlock with group normalisation that passes over memory only for normalisations and convolutions."""

    def __init__(self, block: ResBlock):
        super().__init__()
        assert isinstance(block.norm1, nn.GroupNorm)
        assert isinstance(block.norm2, nn.GroupNorm)
        self.norm1, self.norm2, self.skip = block.norm1, block.norm2, block.skip
        self.conv1, self.conv2 = FastConv2d(block.conv1), FastConv2d(block.conv2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = _usable(x, "the input", (None, self.conv1.in_channels, None, None))
        h = self.conv1(norm_silu(x, self.norm1))
        norm_silu(h, self.norm2, out=h)
        return self.conv2(h, added=self._skipped(x))

    def _skipped(self, x: Tensor) -> Tensor:
        if isinstance(self.skip, nn.Identity):
            return x
        assert isinstance(self.skip, nn.Conv2d)
        weight = _parameter(self.skip.weight, "the weight", (self.conv2.out_channels, self.conv1.in_channels, 1, 1))
        # With channels last in memory, a 1x1 convolution is a matrix product.
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), self.skip.bias).permute(0, 3, 1, 2)


def norm_silu(x: Tensor, norm: nn.GroupNorm, out: Tensor | None = None) -> Tensor:
    """Apply group normalisation and SiLU to (N, C, H, W). The result is fp32, channels last in memory.

    Args:
        x: The input; fp16 and bf16 are cast to fp32.
        norm: The normalisation.
        out: Where to write the result: fp32, channels last in memory, of the shape of `x`. It may be `x`.

    Raises:
        ValueError: if a tensor is not what the kernels can read or write.
    """
    given, x = x, _usable(x, "the input", (None, norm.num_channels, None, None))
    n, c, h, w = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    elif _usable(out, "the output", tuple(given.shape)) is not out:
        raise ValueError(f"the output must be fp32 and channels last in memory, not {_described(out)}")
    scale = None if norm.weight is None else _parameter(norm.weight, "the weight", (c,))
    shift = None if norm.bias is None else _parameter(norm.bias, "the bias", (c,))
    sizes, eps = _ints(n, h * w, c, norm.num_groups), ctypes.c_float(norm.eps)
    at = _data(x), _data(scale), _data(shift), _data(out)
    if x.numel() and _library().normalise(*at, *sizes, eps, ctypes.c_int(1)):
        raise MemoryError(f"no memory for a normalisation of {n} x {h} x {w} pixels")
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


def _usable(x: Tensor, what: str, shape: tuple[int | None, ...]) -> Tensor:
    """Return a tensor as the kernels take it: fp32 on a CPU, channels last in memory. fp16 and bf16 are cast.

    Args:
        x: The tensor.
        what: What to call it in an error message.
        shape: The size that each dimension must have, None for any.

    Raises:
        ValueError: if the shape, the device or the dtype is another, or if a gradient would be lost.
    """
    if x.dim() != len(shape) or any(size not in (None, own) for size, own in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} must have the shape ({wanted}), not {_described(x)}")
    if x.device.type != "cpu" or x.layout != torch.strided or x.dtype not in CASTABLE:
        raise ValueError(f"{what} must be a dense tensor of fp32, fp16 or bf16 on a CPU, not {_described(x)}")
    _without_gradient(x, what)
    return x.float().contiguous(memory_format=torch.channels_last)


def _parameter(value: Tensor, what: str, shape: tuple[int, ...]) -> Tensor:
    """Return a parameter of a layer, contiguous in memory.

    Raises:
        ValueError: if it is not fp32 on a CPU, if its shape is another, or if a gradient would be lost.
    """
    if value.device.type != "cpu" or value.layout != torch.strided or value.dtype != torch.float32:
        raise ValueError(
            f"native kernels take weights in fp32 on a CPU, but {what} of this layer is {_described(value)} now; load "
            "the model again to use it in another dtype or on another device"
        )
    if value.shape != shape:
        raise ValueError(f"{what} of this layer must have the shape {shape}, not {_described(value)}")
    _without_gradient(value, what)
    return value.detach().contiguous()


def _without_gradient(x: Tensor, what: str) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{what} requires a gradient, and none flows through native kernels: use torch.inference_mode() or "
            "torch.no_grad(), or a model that was not accelerated"
        )


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)}, {x.dtype} on {x.device}"


def _tracked(parameter: Tensor | None) -> nn.Parameter | None:
    """Return a parameter whose changes PyTorch counts: a copy if it was made in inference mode, otherwise itself."""
    if parameter is None or not parameter.is_inference():
        return parameter  # type: ignore[return-value]
    with torch.inference_mode(False):
        return nn.Parameter(parameter.clone(), requires_grad=False)


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
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache.startswith("~"):
        raise NoKernels("there is no home folder for compiled kernels: set HOME or XDG_CACHE_HOME")
    folder = Path(cache) / "litevae"
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
