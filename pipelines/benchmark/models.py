"""Compare encoders and decoders: images/s, latency, peak memory, and their share of what the machine can do.

Each contender is a process of its own (`python -m pipelines.benchmark.models NAME MODE PART PRECISION THREADS DEVICE`).
All contenders of a table are measured in turn.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import ENCODERS, LiteVAE, count_parameters
from litevae.encoder import SIZES, Encoder
from litevae.errors import UserError
from litevae.inference import best_kernels, prepare_for_inference
from litevae.latents import encode_latents, latent_content
from pipelines.benchmark import meter
from pipelines.benchmark.config import Benchmark
from pipelines.evaluation.timed_half import TimedHalf
from pipelines.runtime.host import PeakMemory

TITLES = {"sd-vae": "SD-VAE", "taesd": "TAESD", "dc-ae": "DC-AE (f = 32)", "pseudocode-B": "LiteVAE-B, pseudocode"}
GPU_SECONDS = 0.2  # duration of the forward passes that give one sample
MODES = {
    "eager": "as PyTorch runs it",
    "channels-last": "PyTorch, channels last",
    "sliced": "PyTorch, channels last, image by image",
    "compiled": "torch.compile, channels last",
    "fast": "as this project's jobs run it: native kernels, image by image, on a CPU in fp32; compile=true on a GPU",
}


def encoder(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure encoders; yield one table per resolution and precision."""
    return _tables(setting, "encoder")


def decoder(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure decoders; yield one table per resolution and precision."""
    return _tables(setting, "decoder")


def _tables(setting: meter.Setting, part: str) -> Iterator[meter.ReportTable]:
    for precision in setting.config.precisions:
        limits = meter.limits(setting.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        for resolution in setting.config.resolutions:
            yield _table(setting, part, precision, resolution, limits)


def _table(
    setting: meter.Setting, part: str, precision: str, resolution: int, limits: dict[str, float]
) -> meter.ReportTable:
    config = setting.config
    contenders: list[tuple[str, str]] = [
        (name, mode) for mode in config.modes for name in config.models if _has(config, name, mode, part)
    ]
    found: dict[tuple[str, str], dict[str, Any]] = {contender: {} for contender in contenders}
    largest = max(config.batch_sizes)
    with ExitStack() as stack:
        children: dict[tuple[str, str], meter.Child] = {}
        for name, mode in contenders:
            child = meter.Child(
                "pipelines.benchmark.models", name, mode, part, precision, setting.threads, setting.device
            )
            children[name, mode] = stack.enter_context(child)
        with ThreadPoolExecutor(len(children) if setting.device.type == "cuda" else 1) as pool:
            warm = partial(_warm, batches=config.batch_sizes, resolution=resolution, device=setting.device)
            for contender, memory in zip(children, pool.map(warm, children.values()), strict=True):
                found[contender]["memory"] = memory
        for batch in config.batch_sizes:
            seconds: dict[tuple[str, str], list[float]] = {contender: [] for contender in contenders}
            for _ in range(config.repeats):
                for contender, child in children.items():
                    answer = child.ask(do="time", batch=batch, resolution=resolution)
                    seconds[contender].append(answer["seconds"])
            for contender, taken in seconds.items():
                found[contender][f"seconds {batch}"] = taken
    for (name, _), values in found.items():
        values |= about(name, part, resolution, precision)
    table = meter.ReportTable(
        f"The {part} at {resolution} px, {precision}",
        f"Batches of {' and '.join(map(str, sorted(config.batch_sizes)))}, {config.repeats} of each in turn: median "
        f"(range). Times: against the first row, the median of ratios of the same round. Memory: the peak of a fresh "
        f"process' first batch of {largest} beyond weights and input. Limit: the least time for the convolutions' and "
        f"products' operations at {limits['matrix'] / 1e9:,.0f} GFLOP/s and their bytes at "
        f"{limits['copy'] / 1e9:,.0f} GB/s, both measured here, over the time taken; above 100 % where there are "
        f"algorithms with fewer operations. {'; '.join(f'{mode}: {MODES[mode]}' for mode in config.modes)}.",
        ["", "parameters", "GFLOP an image", f"images/s, batch {largest}", "times", "memory, MB", "times"]
        + [f"ms, batch {batch}" for batch in sorted(config.batch_sizes) if batch != largest]
        + ["share of the limit"],
        samples={"limits": limits},
    )
    base = found[contenders[0]]
    for (name, mode), values in found.items():
        taken, memory = values[f"seconds {largest}"], values["memory"]
        least = sum(max(flops / limits["matrix"], moved / limits["copy"]) for flops, moved in values["layers"])
        table.rows.append(
            [
                f"{_title(name, part)}, {mode}",
                f"{values['parameters'] / 1e6:.2f} M",
                f"{sum(flops for flops, _ in values['layers']) / 1e9:.1f}",
                meter.median_and_range(meter.rates(taken, largest), 2),
                f"{1 / meter.ratio(taken, base[f'seconds {largest}']):.2f}",
                f"{memory / 1e6:,.0f}",
                f"{memory / max(1, base['memory']):.3f}",
                *(
                    meter.median_and_range([1000 * value for value in values[f"seconds {batch}"]], 1)
                    for batch in sorted(config.batch_sizes)
                    if batch != largest
                ),
                f"{least * largest / statistics.median(taken):.0%}",
            ]
        )
        table.samples[f"{name}, {mode}"] = values
    return table


def _warm(child: meter.Child, batches: Sequence[int], resolution: int, device: torch.device) -> int:
    """Warm up a contender, and return the peak memory of its first forward pass in bytes, in a fresh process.

    On a GPU, compiled models are compiled here for every batch size. That takes minutes, so contenders do it at the
    same time.
    """
    largest = max(batches)
    memory = child.ask(do="memory", batch=largest, resolution=resolution)["bytes"]
    for batch in batches if device.type == "cuda" else ():
        if batch != largest:
            child.ask(do="time", batch=batch, resolution=resolution)
    return memory


def _has(config: Benchmark, name: str, mode: str, part: str) -> bool:
    """Return whether a model is measured in this mode and part.

    The paper's pseudocode is run only as it is printed, and describes only the encoder. LiteVAE's decoder does not
    depend on the encoder's size, so it is measured once.
    """
    if name == "pseudocode-B":
        return mode == "eager" and part == "encoder"
    sizes = [each for each in config.models if each in SIZES]
    return part == "encoder" or name not in sizes or name == sizes[0]


def _title(name: str, part: str) -> str:
    if name in SIZES:
        return f"LiteVAE-{name}" if part == "encoder" else "LiteVAE"
    return TITLES.get(name, name)


def about(name: str, part: str, resolution: int, precision: str) -> dict[str, Any]:
    """Count the parameters and the work of one part of a model.

    Args:
        name: the model.
        part: "encoder" or "decoder".
        resolution: side of the image in pixels.
        precision: "fp32" or "bf16".

    Returns:
        `parameters`, and `layers`: for each convolution and linear layer its FLOPs for one image and the bytes that it
        must move.
    """
    name = "B" if name == "pseudocode-B" else name
    # A model folder is loaded before fake mode starts, because a file does not give fake weights.
    loaded = None if name in TITLES or name in ENCODERS else load_autoencoder(name)
    layers = Layers(2 if precision == "bf16" else 4)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # computes only shapes
        model: Any = loaded or build(name, "eager")
        half: nn.Module = getattr(model, part)
        with mock.patch.object(half, "forward", layers.counting(half.forward)):
            latents = encode_latents(model, torch.empty(1, 3, resolution, resolution))
            if part == "decoder":
                model.decode(latents.chunk(2, dim=1)[0] if latent_content(model) == "moments" else latents)
    return {"parameters": count_parameters(half), "layers": layers.found}


class Layers(TorchDispatchMode):
    """Record (FLOPs, bytes) of each convolution and matrix product that is really computed.

    Counting by modules would give too much, because this project's up- and downsampling need fewer operations than
    their modules suggest.

    Args:
        size: bytes of a number.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.found: list[tuple[int, int]] = []

    def counting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a forward function so that its operations are recorded."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm):
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=y)
            tensors = [each for each in (*args, y) if isinstance(each, Tensor) and each.ndim > 1]  # without biases
            self.found.append((flops, self.size * sum(each.numel() for each in tensors)))
        return y


# --- a contender's process ----------------------------------------------------------------------------------------


def build(name: str, mode: str) -> Any:
    """Build a model in eval mode: diffusers' or this project's with random weights, or one from a model folder."""
    torch.manual_seed(0)
    if name == "sd-vae" and mode != "fast":  # diffusers' model as users run it; "fast" takes this project's equal one
        from diffusers import AutoencoderKL

        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2).eval()
    if name == "taesd":
        from diffusers import AutoencoderTiny

        return AutoencoderTiny().eval()
    if name == "dc-ae":
        from diffusers import AutoencoderDC

        kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        return AutoencoderDC(  # the architecture of dc-ae-f32c32
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_layers_per_block=(0, 4, 8, 2, 2, 2),
            decoder_layers_per_block=(0, 5, 10, 2, 2, 2),
            encoder_qkv_multiscales=((), (), (), (), (), ()),
            decoder_qkv_multiscales=((), (), (), (), (), ()),
        ).eval()
    if name == "pseudocode-B":
        model = LiteVAE("B")
        model.encoder.__class__ = Pseudocode
        return model.eval()
    return LiteVAE(name).eval() if name in ENCODERS else load_autoencoder(name)


class Pseudocode(Encoder):
    """The encoder as the paper prints it, with a whole wavelet transform for each level (Appendix G)."""

    def forward(self, x: Tensor) -> Tensor:
        import ptwt

        features = []
        for level, extract, down in zip((1, 2, 3), self.extractors, self.downsamplers, strict=True):
            low, (horizontal, vertical, diagonal), *_ = ptwt.wavedec2(x, "haar", level=level, mode="zero")
            bands = torch.cat([low, horizontal, vertical, diagonal], dim=1) / 2**level
            features.append(down(extract(bands)))
        return self.aggregator(torch.cat(features, dim=1))


class Contender:
    """A model in a contender's process, which answers requests for its time or its memory.

    Args:
        name, mode, part, precision, threads, device: the arguments of the command line.
    """

    def __init__(self, name: str, mode: str, part: str, precision: str, threads: str, device: str):
        torch.set_num_threads(int(threads))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device(device)
        self.half = TimedHalf(build(name, mode), part, self.device, precision)
        compiled = mode == "compiled" or (mode == "fast" and self.device.type == "cuda")
        if mode == "fast":
            prepare_for_inference(self.half.model, self.device, best_kernels(self.device, precision), compiled)
        elif mode == "sliced":
            prepare_for_inference(self.half.model, self.device, "sliced")
        elif mode in ("channels-last", "compiled"):
            self.half.model.to(memory_format=torch.channels_last)
        if compiled:
            self.half.forward = torch.compile(self.half.run)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer {"do": "memory" or "time", "batch": ..., "resolution": ...} with peak bytes or seconds of a pass.

        Raises:
            UserError: if the batch does not fit into the GPU's memory.
        """
        x, seconds = self.half.input(request["batch"], request["resolution"]), self.half.seconds
        try:
            if request["do"] == "memory":
                memory = PeakMemory(self.device)
                seconds(x, 1)
                return {"bytes": memory.bytes()}
            if self.device.type != "cuda":
                return {"seconds": seconds(x, 1)}
            seconds(x, 1)  # a GPU is slow at first after it was idle
            return {"seconds": seconds(x, max(1, round(GPU_SECONDS / seconds(x, 1))))}
        except torch.OutOfMemoryError:
            raise UserError(
                f"batches of {request['batch']} do not fit into the GPU's memory: lower batch_sizes"
            ) from None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # other contenders use the same GPU


if __name__ == "__main__":
    meter.serve(Contender(*sys.argv[1:]))
