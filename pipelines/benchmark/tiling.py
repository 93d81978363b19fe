"""Measure tiling: the peak memory of whole images and of tiles, and how far what they give differs.

Every measurement is a process of its own (`python -m pipelines.benchmark.tiling`), which gets the fields of `Call`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import ENCODERS, FACTOR, LiteVAE
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.tiling import tile_starts
from pipelines.benchmark import meter
from pipelines.benchmark.models import TITLES
from pipelines.runtime.host import PeakMemory


@dataclass(frozen=True)
class Call:
    """A call whose memory is measured.

    Attributes:
        model: one of LiteVAE's sizes, with random weights, or a model folder.
        do: "encode" or "decode".
        tiled: whether tiling is enabled.
        photo: the image, which is scaled and cropped to a square.
        resolution: side of the square in pixels.
        place: folder where results are left: posterior means and images, as tensors.
        threads: CPU threads.
        device: the device to measure.
    """

    model: str
    do: Literal["encode", "decode"]
    tiled: bool
    photo: str
    resolution: int
    place: str
    threads: int
    device: str

    def result(self, do: str, tiled: bool) -> Path:
        """Return the file of a result."""
        return Path(self.place) / f"{do}-{'tiled' if tiled else 'whole'}.pt"


def tiling(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure the models of `config.models` that have this project's tiling, at each resolution.

    Raises:
        UserError: if no such model is named, or an image is not larger than a tile.
    """
    config = setting.config
    names = [name for name in config.models if name in ENCODERS or name not in TITLES]
    if not names:
        raise UserError(f"part tiling measures LiteVAE; give models={','.join(ENCODERS)} or model folders")
    if (least := min(config.resolutions)) <= (tile := LiteVAE("S").tile_sample_min_size):
        raise UserError(f"part tiling: images of {least} px are one tile; give resolutions above {tile}")
    photo = setting.photos()[0]
    table = meter.ReportTable(
        f"Tiling, tiles of {tile} px",
        f"Peak memory in MB of a call in a fresh process, beyond weights and input, one image. Differences between "
        f"the tiled and the whole reconstruction of the photo {photo.name}, in levels of 0 to 255: mean, and maximum "
        f"in brackets; where tiles overlap, and elsewhere.",
        ["", "encode", "encode, tiled", "decode", "decode, tiled", "difference in overlaps", "elsewhere"],
    )
    for name in names:
        for resolution in config.resolutions:
            place = setting.place / f"tiling-{len(table.rows)}"
            place.mkdir()
            common = {"model": name, "photo": str(photo), "resolution": resolution, "place": str(place)}
            common |= {"threads": setting.threads, "device": str(setting.device)}
            calls = [
                Call(**common, do=do, tiled=tiled)  # type: ignore[arg-type]
                for do in ("encode", "decode")
                for tiled in (False, True)
            ]
            peaks = [measured(call) for call in calls]
            whole, tiled = (torch.load(calls[0].result("decode", tiled)) for tiled in (False, True))
            found = differences(whole, tiled, calls[0])
            cells = [f"{mean:.2f} ({most:.1f})" for mean, most in (found["overlaps"], found["elsewhere"])]
            title = f"LiteVAE-{name}" if name in ENCODERS else name
            table.rows.append([f"{title}, {resolution} px", *(f"{peak / 1e6:,.0f}" for peak in peaks), *cells])
            table.samples[f"{name}, {resolution} px"] = {"bytes": peaks, "levels": found}
    yield table


def measured(call: Call) -> int:
    """Return the peak memory of a call in bytes, in a fresh process, beyond the weights and the input."""
    with meter.Child("pipelines.benchmark.tiling") as child:
        return child.ask(**asdict(call))["bytes"]


def differences(whole: Tensor, tiled: Tensor, call: Call) -> dict[str, tuple[float, float]]:
    """Compare images (1, 3, H, W) in [-1, 1] after clipping, in levels of 0 to 255.

    Returns:
        Mean and maximum of the absolute differences: "overlaps", where tiles overlap, and "elsewhere".
    """
    model = LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    tile, latent_tile = model.tile_sample_min_size, model.tile_latent_min_size
    overlap = int(latent_tile * model.tile_overlap_factor)
    covered = torch.zeros(call.resolution)
    for start in tile_starts(call.resolution // FACTOR, latent_tile, overlap):
        covered[FACTOR * start : FACTOR * start + tile] += 1
    once = (covered[:, None] == 1) & (covered == 1)
    levels = 127.5 * (tiled.clamp(-1, 1) - whole.clamp(-1, 1)).abs()
    parts = {"overlaps": levels[..., ~once], "elsewhere": levels[..., once]}
    return {name: (float(part.mean()), float(part.max())) for name, part in parts.items()}


@torch.inference_mode()
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Make the `Call` that the request describes, and return its peak memory in bytes as {"bytes": ...}."""
    call = Call(**request)
    torch.set_num_threads(call.threads)
    torch.manual_seed(0)
    model: Any = LiteVAE(call.model).eval() if call.model in ENCODERS else load_autoencoder(call.model)
    if not isinstance(model, LiteVAE):
        raise UserError(f"part tiling measures LiteVAE, and {call.model} is a {type(model).__name__}")
    device = torch.device(call.device)
    model.to(device)
    if call.do == "encode":
        pixels = ImageTransform(call.resolution)(Path(call.photo).read_bytes()).pixels
        x = to_tensor(torch.from_numpy(pixels[None].copy())).to(device)
    else:
        x = torch.load(call.result("encode", call.tiled)).to(device)
    if call.tiled:
        model.enable_tiling()
    memory = PeakMemory(device)
    y = model.encode(x).latent_dist.mode() if call.do == "encode" else model.decode(x).sample
    peak = memory.bytes()
    torch.save(y.cpu(), call.result(call.do, call.tiled))
    return {"bytes": peak}


if __name__ == "__main__":
    meter.serve(answer)
