"""Presets of denoising networks: UNets of diffusers, and DiTs. They see normalised latents (mean 0, variance 1)."""

from diffusers import UNet2DModel
from torch import nn

from litevae.dit import DiT
from litevae.errors import UserError

# Width of each level, number of ResBlocks per level, and number of the finest levels that have no attention. On the
# other levels attention follows every ResBlock, with heads of width 32. Numbers in comments are parameter counts.
UNETS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "ldm-8": ((256, 512, 1024), 2, 0),  # Rombach et al. 2022, Table 14, LDM-8 (CelebA-HQ): 257,733,124 at n_z = 4
    "ldm-4": ((224, 448, 672, 896), 2, 1),  # the same, Table 12, LDM-4 (CelebA-HQ, FFHQ): 274,056,163 at n_z = 3
    "small": ((64, 128, 256), 2, 0),  # ldm-8 at a quarter of the width: 16.1 M
    "tiny": ((64, 96), 1, 0),  # 1.9 M; trains in minutes on a CPU, on latents of 8x8 or a little more
}

# Width, number of blocks, number of heads (Peebles & Xie 2023, Table 1). "/2" is the side of a patch.
DITS: dict[str, tuple[int, int, int]] = {
    "dit-s/2": (384, 12, 6),  # 33 M with 1000 classes
    "dit-b/2": (768, 12, 12),  # 130 M
    "dit-l/2": (1024, 24, 16),  # 458 M
    "dit-xl/2": (1152, 28, 16),  # 675 M
}
_PATCH = 2

NETWORKS = (*UNETS, *DITS)


def build_denoiser(network: str, channels: int, size: int, classes: int = 0) -> UNet2DModel | DiT:
    """Build a new denoising network for latents (N, channels, size, size). At initialisation it predicts zero.

    UNets and DiTs are called in the same way: `model(sample, timestep, class_labels).sample`, with a timestep in
    [0, 1000], either one for all or (N,). A timestep that is not an integer must be a tensor, because the UNet of
    diffusers rounds a Python float down.

    Args:
        network: One of `NETWORKS`.
        channels: Number of latent channels.
        size: Side of the latents.
        classes: Number of classes; 0 for an unconditional network. A conditional network needs labels (N,), which are
            below `classes`, or `null_class(classes)` for "none".

    Raises:
        UserError: if the network is unknown, or the size can't be halved often enough or cut into patches.
    """
    if network not in NETWORKS:
        raise UserError(f"network={network} is unknown; choose one of {', '.join(NETWORKS)}")
    table = null_class(classes) + 1 if classes else None
    if network in DITS:
        _check_size(network, f"cuts latents into patches of {_PATCH}x{_PATCH}", _PATCH, size)
        width, blocks, heads = DITS[network]
        return DiT(size, channels, channels, width, blocks, heads, _PATCH, table)
    widths, layers, plain = UNETS[network]
    levels = len(widths)
    _check_size(network, f"halves latents {levels - 1} times", 2 ** (levels - 1), size)
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * (levels - plain),
        up_block_types=("AttnUpBlock2D",) * (levels - plain) + ("UpBlock2D",) * plain,
        attention_head_dim=32,
        num_class_embeds=table,
    )
    # As in Rombach et al., the last layers of ResBlocks and attention blocks and the output convolution start at zero.
    for name, module in unet.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def null_class(classes: int) -> int:
    """Return the label that means "no class" in a model with this number of classes.

    The DiTPipeline of diffusers always uses 1000 for it. So with fewer than 1000 classes, some rows of the label table
    are unused.
    """
    return max(classes, 1000)


def _check_size(network: str, does: str, factor: int, size: int) -> None:
    if size < 1 or size % factor:
        raise UserError(
            f"network={network} {does}, so their size must be a multiple of {factor}, and it is {size}; encode at a "
            f"resolution that is a multiple of {factor} times the autoencoder's downsampling ({8 * factor} px at "
            f"f = 8), or take another network"
        )
