"""Convert between diffusers' AutoencoderKL and the parts of LiteVAE that have its architecture.

These are the encoder of `size="sd-vae"` and the decoder with group normalisation that predicts images. Both models have
the same layers in the same order, under other names. Their outputs are equal.

The 1x1 convolutions of an AutoencoderKL with `use_quant_conv` and `use_post_quant_conv` become those of
`conv1x1=True`. An AutoencoderKL that has only one of the two gets the identity for the other one. Nothing is folded
into other layers: `post_quant_conv` can't be, since the padding of the convolution after it is zero and not its bias.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from litevae.autoencoder import LiteVAE
from litevae.baselines import SD_SIZES
from litevae.errors import UserError

Part = Literal["encoder", "decoder"]
PARTS: tuple[Part, ...] = get_args(Part)

_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "skip"}
_ATTENTION = {"group_norm": "norm", "to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_OUTER = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}


def names(part: Part, levels: int, layers: int) -> dict[str, str]:
    """Return the module names of a part of AutoencoderKL, each with that of the same layer in LiteVAE.

    Args:
        part: "encoder" or "decoder".
        levels: Number of levels, each with its own width.
        layers: `layers_per_block` of diffusers.
    """
    found = dict(_OUTER)
    blocks, ours = ("down_blocks", "down") if part == "encoder" else ("up_blocks", "up")
    resnets = layers if part == "encoder" else layers + 1
    resize, place = ("downsamplers.0.conv", "1") if part == "encoder" else ("upsamplers.0.conv", "1")
    for level in range(levels):
        for number in range(resnets):
            for theirs, own in _RESNET.items():
                found[f"{blocks}.{level}.resnets.{number}.{theirs}"] = f"{ours}.{level}.{number}.{own}"
        if level < levels - 1:  # the convolution comes second in ours, after padding or nearest-neighbour upsampling
            found[f"{blocks}.{level}.{resize}"] = f"{ours}.{level}.{resnets}.{place}"
    for number, own_number in ((0, 0), (1, 2)):
        for layer, name in _RESNET.items():
            found[f"mid_block.resnets.{number}.{layer}"] = f"mid.{own_number}.{name}"
    for layer, name in _ATTENTION.items():
        found[f"mid_block.attentions.0.{layer}"] = f"mid.1.{name}"
    return found


def check_kl(config: Mapping[str, Any]) -> None:
    """Check that an AutoencoderKL has only layers that LiteVAE has too.

    Raises:
        UserError: if it has others. The message names the first difference.
    """
    widths = list(config["block_out_channels"])
    for wrong, what in (
        (len(widths) != 4, f"{len(widths)} levels; f = 8 needs exactly 4"),
        (config["act_fn"] != "silu", f"the activation {config['act_fn']}, not silu"),
        (config["norm_num_groups"] is None, "no group normalisation"),
        (set(config["down_block_types"]) != {"DownEncoderBlock2D"}, f"{config['down_block_types']} in its encoder"),
        (set(config["up_block_types"]) != {"UpDecoderBlock2D"}, f"{config['up_block_types']} in its decoder"),
        (config.get("mid_block_add_attention", True) is False, "no attention in its middle"),
    ):
        if wrong:
            raise UserError(f"this AutoencoderKL can't be converted: it has {what}")


def part_from_kl(kl: AutoencoderKL, part: Part) -> dict[str, Tensor]:
    """Return the weights of the encoder or the decoder of an AutoencoderKL, under the names of LiteVAE's.

    Raises:
        UserError: if it has layers that LiteVAE does not have.
    """
    check_kl(kl.config)
    known = names(part, len(kl.config["block_out_channels"]), kl.config["layers_per_block"])
    return _renamed(getattr(kl, part).state_dict(), known)


def litevae_from_kl(kl: AutoencoderKL) -> LiteVAE:
    """Build the LiteVAE (`size="sd-vae"`) with the weights and the output of an AutoencoderKL.

    Raises:
        UserError: if it has other layers or widths than LiteVAE's baseline encoder and decoder.
    """
    check_kl(kl.config)
    config, widths = kl.config, tuple(kl.config["block_out_channels"])
    if (widths, config["layers_per_block"]) != (SD_SIZES["sd-vae"], 2):
        raise UserError(
            f"this AutoencoderKL has block_out_channels={widths} and layers_per_block={config['layers_per_block']}; "
            f"the encoder of size='sd-vae' has {SD_SIZES['sd-vae']} and 2. Take decoder_from_kl"
        )
    with torch.device("meta"):
        model = LiteVAE("sd-vae", conv1x1=_has_1x1(kl), **_shared(kl))
    state = {f"{part}.{key}": value for part in PARTS for key, value in part_from_kl(kl, part).items()}
    return _filled(model, kl, state)


def decoder_from_kl(kl: AutoencoderKL, **encoder: Any) -> LiteVAE:
    """Build a LiteVAE with the decoder of an AutoencoderKL and a new encoder.

    Args:
        kl: The AutoencoderKL.
        encoder: Arguments of `LiteVAE` for the encoder: `size`, `wavelet` and so on.

    Raises:
        UserError: if the decoder has layers that LiteVAE does not have, or groups of another size.
    """
    model = LiteVAE(conv1x1=_has_1x1(kl), **encoder, **_shared(kl))
    load_decoder(model, kl)
    return model


def load_decoder(model: LiteVAE, source: AutoencoderKL | LiteVAE) -> None:
    """Put the decoder of another model, with its `post_quant_conv`, into a LiteVAE, in place.

    Raises:
        UserError: if the decoders differ. The message says how the LiteVAE must be configured.
    """
    own = {key: _plain(model.config[key]) for key in ("block_out_channels", "layers_per_block", "latent_channels")}
    own |= {key: model.config[key] for key in ("decoder_norm", "output", "conv1x1")}
    if isinstance(source, LiteVAE):
        weights = source.decoder.state_dict()
        theirs = {key: _plain(source.config[key]) for key in own}
    else:
        weights = part_from_kl(source, "decoder")
        theirs = {key: _plain(value) for key, value in _shared(source).items() if key in own}
        theirs |= {"decoder_norm": "group", "output": "image", "conv1x1": _has_1x1(source)}
    fields = {
        "block_out_channels": "model.decoder.channels", "layers_per_block": "model.decoder.layers",
        "latent_channels": "model.latent_channels", "decoder_norm": "model.decoder.norm",
        "output": "model.decoder.output", "conv1x1": "model.conv1x1",
    }  # fmt: skip
    if wrong := [f"{fields[key]}={_text(value)}" for key, value in theirs.items() if value != own[key]]:
        raise UserError(f"the decoder is another one; set {' '.join(wrong)}")
    if not isinstance(source, LiteVAE):
        _check_groups(model.decoder, source.decoder, names("decoder", 4, source.config["layers_per_block"]))
    model.decoder.load_state_dict(weights)
    if own["conv1x1"]:
        model.post_quant_conv.load_state_dict(_one_by_one(source, "post_quant_conv"))


def to_autoencoder_kl(model: LiteVAE) -> AutoencoderKL:
    """Return the stock AutoencoderKL with the weights and the output of a LiteVAE that has only its layers.

    Raises:
        UserError: if the encoder is not `size="sd-vae"`, or the decoder is not that of SD-VAE. The message says which
            part it is.
    """
    config = model.config
    for wrong, what in (
        (config["size"] != "sd-vae", f"its encoder is {config['size']}, not sd-vae"),
        (config["decoder_norm"] != "group", f"its decoder has decoder_norm={config['decoder_norm']}, not group"),
        (config["output"] != "image", f"its decoder predicts output={config['output']}, not the image"),
        (
            tuple(config["block_out_channels"]) != SD_SIZES["sd-vae"] or config["layers_per_block"] != 2,
            f"its decoder has block_out_channels={list(config['block_out_channels'])} and layers_per_block="
            f"{config['layers_per_block']}; AutoencoderKL needs those of the encoder: {list(SD_SIZES['sd-vae'])} and 2",
        ),
    ):
        if wrong:
            raise UserError(f"this LiteVAE can't be an AutoencoderKL: {what}")
    statistics = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
    with torch.device("meta"):
        kl = AutoencoderKL(
            in_channels=config["in_channels"], out_channels=config["in_channels"],
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(config["block_out_channels"]), layers_per_block=2,
            latent_channels=config["latent_channels"], norm_num_groups=32, use_quant_conv=config["conv1x1"],
            use_post_quant_conv=config["conv1x1"],
            **{key: config[key] for key in statistics if config.get(key) is not None},
        )  # fmt: skip
    state: dict[str, Tensor] = {}
    for part in PARTS:
        back = {own: theirs for theirs, own in names(part, 4, 2).items()}
        found = _renamed(getattr(model, part).state_dict(), back)
        state |= {f"{part}.{key}": value for key, value in found.items()}
    for name in ("quant_conv", "post_quant_conv"):
        state |= {f"{name}.{key}": value for key, value in getattr(model, name).state_dict().items()}
    kl.load_state_dict(state, assign=True)
    return kl.eval()


def _shared(kl: AutoencoderKL) -> dict[str, Any]:
    """Return the arguments of `LiteVAE` that an AutoencoderKL's config gives."""
    config = kl.config
    known = inspect.signature(LiteVAE.__init__).parameters
    wanted = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "latent_channels")
    found = {key: config[key] for key in wanted if key in known and config.get(key) is not None}
    return found | {
        "in_channels": config["in_channels"],
        "block_out_channels": tuple(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
    }


def _filled(model: LiteVAE, kl: AutoencoderKL, state: dict[str, Tensor]) -> LiteVAE:
    """Give a model on the meta device the weights of an AutoencoderKL, and check that the groups are the same."""
    for part in PARTS:
        _check_groups(getattr(model, part), getattr(kl, part), names(part, 4, kl.config["layers_per_block"]))
    if model.config["conv1x1"]:
        for name in ("quant_conv", "post_quant_conv"):
            state |= {f"{name}.{key}": value for key, value in _one_by_one(kl, name).items()}
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return model.eval()


def _has_1x1(kl: AutoencoderKL) -> bool:
    return kl.quant_conv is not None or kl.post_quant_conv is not None


def _one_by_one(source: Any, name: str) -> dict[str, Tensor]:
    """Return the weights of a 1x1 convolution; the identity for an AutoencoderKL that does not have it."""
    layer = getattr(source, name)
    if layer is not None:
        return layer.state_dict()
    channels = source.config["latent_channels"] * (2 if name == "quant_conv" else 1)
    like = next(source.parameters())
    return {
        "weight": torch.eye(channels).view(channels, channels, 1, 1).to(like),
        "bias": torch.zeros(channels).to(like),
    }


def _check_groups(own: torch.nn.Module, theirs: torch.nn.Module, known: Mapping[str, str]) -> None:
    """Check that each group normalisation has the same number of groups, which is not in the weights."""
    for their_name, name in known.items():
        layer = dict(own.named_modules()).get(name)
        if isinstance(layer, torch.nn.GroupNorm):
            groups = theirs.get_submodule(their_name).num_groups
            if groups != layer.num_groups:
                raise UserError(
                    f"this AutoencoderKL normalises {layer.num_channels} channels in {groups} groups, LiteVAE in "
                    f"{layer.num_groups}: norm_num_groups must be {layer.num_groups}"
                )


def _renamed(state: Mapping[str, Tensor], known: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename the modules in a state's keys."""
    return {re.sub(r"^.*(?=\.[^.]+$)", lambda found: known[found[0]], key): value for key, value in state.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
