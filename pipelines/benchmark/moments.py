"""The error of cached moments, by the precision of the network and the number format that is stored."""

import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from litevae import native
from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.inference import FastPath, one_by_one, prepare_for_inference
from litevae.latents import encode_latents, latent_content
from litevae.precision import autocast
from litevae.shards import from_stored, to_stored
from pipelines.benchmark import meter

PHOTOS = 16  # at most
STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def moments(setting: meter.Setting) -> list[meter.ReportTable]:
    """Compare the moments that each path on a CPU computes and a cache stores with PyTorch's in fp64.

    Errors of the mean are in units of the posterior's sigma at the same element, which is the scale of the noise that
    a draw adds.

    Raises:
        UserError: if the model has no posterior.
    """
    config = setting.config
    torch.manual_seed(0)
    model = load_autoencoder(config.model) if config.model else LiteVAE("S").eval()
    if latent_content(model) != "moments":
        raise UserError(f"model={config.model} has no posterior, so its latents have no sigma; leave out parts=moments")
    resolution = config.resolutions[0]
    transform = ImageTransform(resolution)
    photos = [np.array(transform(file.read_bytes()).pixels) for file in setting.photos()[:PHOTOS]]
    x = to_tensor(torch.from_numpy(np.stack(photos)))
    table = meter.ReportTable(
        f"Cached moments at {resolution} px",
        f"{len(photos)} photos, {'the model ' + config.model if config.model else 'LiteVAE-S with random weights'}. "
        "Error against PyTorch in fp64; of the mean in units of the posterior's sigma at the same element, of the "
        "log-variance in nats.",
        ["computed", "stored", "mean: median", "99 %", "largest", "log-variance: median", "99 %"],
    )
    with torch.inference_mode():
        expected = one_by_one(partial(encode_latents, copy.deepcopy(model).double()), x.double())
        paths = [FastPath("sliced", "fp32"), FastPath("sliced", "bf16")]
        paths += [FastPath("native", "fp32")] if native.available() else []
        for path in paths:
            prepared = prepare_for_inference(copy.deepcopy(model), "cpu", path.kernels)
            with autocast("cpu", path.precision):
                found = one_by_one(partial(encode_latents, prepared), x).float().numpy()
            for stored, dtype in STORED.items():
                errors = error_in_sigma(from_stored(to_stored(found, dtype), dtype).double(), expected)
                table.rows.append([str(path), stored, *(f"{value:.2g}" for value in errors.values())])
                table.samples[f"{path}, {stored}"] = errors
    return [table]


def error_in_sigma(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Compare moments (N, 2 n_z, h, w) with the expected ones.

    Returns:
        The median, the 99th percentile and the maximum of the mean's error in units of the expected sigma, and the
        median and the 99th percentile of the log-variance's error.
    """
    (mean, logvar), (right, right_logvar) = (each.chunk(2, dim=1) for each in (found, expected))
    error = ((mean - right).abs() / (0.5 * right_logvar).exp()).flatten().numpy()
    other = (logvar - right_logvar).abs().flatten().numpy()
    values = [*np.quantile(error, [0.5, 0.99, 1.0]), *np.quantile(other, [0.5, 0.99])]
    names = ("median", "percentile_99", "largest", "logvar_median", "logvar_percentile_99")
    return dict(zip(names, map(float, values), strict=True))
