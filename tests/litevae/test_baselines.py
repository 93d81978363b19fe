"""The encoders that LiteVAE is compared with: SD-VAE's against diffusers', wavelet bands against PyWavelets'."""

import numpy as np
import pytest
import pywt
import torch
from diffusers.models.autoencoders.vae import Encoder as DiffusersEncoder

from litevae.baselines import SD_SIZES, SDEncoder, WaveletEncoder
from litevae.errors import UserError


def diffusers_state(encoder: SDEncoder, layers: int = 2) -> dict[str, torch.Tensor]:
    """Our weights under diffusers' names."""
    names = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    names |= {"mid.1.norm": "mid_block.attentions.0.group_norm", "mid.1.to_out": "mid_block.attentions.0.to_out.0"}
    names |= {f"mid.1.{n}": f"mid_block.attentions.0.{n}" for n in ("to_q", "to_k", "to_v")}
    blocks = {"mid.0": "mid_block.resnets.0", "mid.2": "mid_block.resnets.1"}
    for level in range(4):
        blocks |= {f"down.{level}.{n}": f"down_blocks.{level}.resnets.{n}" for n in range(layers)}
        names[f"down.{level}.{layers}.1"] = f"down_blocks.{level}.downsamplers.0.conv"
    for ours, theirs in blocks.items():
        names |= {f"{ours}.{n}": f"{theirs}.{n}" for n in ("norm1", "conv1", "norm2", "conv2")}
        names[f"{ours}.skip"] = f"{theirs}.conv_shortcut"
    state = {}
    for key, value in encoder.state_dict().items():
        module, _, leaf = key.rpartition(".")
        state[f"{names[module]}.{leaf}"] = value
    return state


@torch.no_grad()
@pytest.mark.parametrize("channels", [(128, 128, 256, 256), SD_SIZES["vae-small"]])
def test_equals_diffusers_encoder(channels):
    """Groups are diffusers' 32 where they divide the width, and else as many as do."""
    torch.manual_seed(0)
    ours = SDEncoder(4, channels).eval()
    for p in ours.parameters():
        p.add_(0.05 * torch.randn_like(p))
    theirs = DiffusersEncoder(
        out_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=channels, norm_num_groups=8,
    ).eval()  # fmt: skip
    theirs.load_state_dict(diffusers_state(ours))
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = {56: 8, 104: 8, 208: 16, 240: 16}.get(module.num_channels, 32)
    x = torch.randn(2, 3, 40, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "counts"), [("sd-vae", (34_163_592, 34_237_336)), ("vae-small", (6_752_464, 6_787_040))]
)
def test_parameters(size, counts):
    """34.16 M and 6.75 M in Table 2."""
    with torch.device("meta"):
        own = [sum(p.numel() for p in SDEncoder(n_z, SD_SIZES[size]).parameters()) for n_z in (4, 12)]
        theirs = DiffusersEncoder(
            out_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=SD_SIZES[size],
            norm_num_groups=8,
        )  # fmt: skip
    assert own == list(counts)
    assert sum(p.numel() for p in theirs.parameters()) == counts[0]


def test_starts_with_the_small_posterior_of_litevae():
    torch.manual_seed(0)
    moments = SDEncoder(4, SD_SIZES["vae-small"])(torch.randn(1, 3, 64, 64).clamp(-1, 1))
    mean, logvar = moments.chunk(2, dim=1)
    assert -8 < logvar.mean() < -4
    assert 0.2 < mean.std() < 5


def test_a_bad_size_is_refused():
    for encoder in (SDEncoder(4, SD_SIZES["vae-small"]), WaveletEncoder(details=False)):
        with pytest.raises(UserError, match="multiple of 8"):
            encoder(torch.zeros(1, 3, 36, 32))


@pytest.mark.parametrize("wavelet", ["haar", "bior2.2"])
def test_the_wavelet_encoders_bands_are_pywavelets(wavelet):
    x = torch.randn(2, 3, 40, 48, dtype=torch.double)
    low, coarse, fine, _ = pywt.wavedec2(x.numpy(), wavelet, mode="periodization", level=3)
    fine = np.concatenate(fine, axis=1)  # (N, 9, H/4, W/4)
    deep = np.stack([fine[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=2).reshape(2, 36, 5, 6)
    dwt, dwt2 = (WaveletEncoder(details, wavelet)(x).double() for details in (False, True))
    assert (dwt.shape, dwt2.shape) == ((2, 12, 5, 6), (2, 48, 5, 6))
    assert torch.equal(dwt2[:, :12], dwt)
    torch.testing.assert_close(dwt, torch.from_numpy(np.concatenate([low, *coarse], axis=1)) / 8, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dwt2[:, 12:], torch.from_numpy(deep) / 4, atol=1e-5, rtol=1e-5)
