"""AutoencoderKL of diffusers and LiteVAE's parts with its architecture, with equal outputs both ways."""

import pytest
import torch
from diffusers import AutoencoderKL

from litevae import baselines, convert
from litevae.autoencoder import LiteVAE
from litevae.convert import decoder_from_kl, litevae_from_kl, load_decoder, to_autoencoder_kl
from litevae.errors import UserError

TINY = (32, 64, 64, 64)


@pytest.fixture
def small_sd_vae(monkeypatch):
    """SD-VAE's encoder with fewer channels: the same layers and names, quick to compute."""
    monkeypatch.setitem(baselines.SD_SIZES, "sd-vae", TINY)
    monkeypatch.setitem(convert.SD_SIZES, "sd-vae", TINY)


def kl(widths=TINY, groups=2, **config):
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, norm_num_groups=groups, **{"layers_per_block": 2, "latent_channels": 4} | config,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def one_rule_of_groups(monkeypatch):
    """Give narrow layers the two groups of `kl`: LiteVAE's own rule is that of SD from 128 channels on."""
    for module in ("layers", "baselines", "decoder"):
        monkeypatch.setattr(
            f"litevae.{module}.group_norm", lambda channels, *_: torch.nn.GroupNorm(2, channels, eps=1e-6)
        )


@pytest.mark.parametrize("quant", [(True, True), (False, False), (True, False), (False, True)])
@torch.no_grad()
def test_there_and_back_outputs_are_equal(small_sd_vae, one_rule_of_groups, images, quant):
    stock = kl(use_quant_conv=quant[0], use_post_quant_conv=quant[1], scaling_factor=0.25)
    model = litevae_from_kl(stock)
    assert model.config.conv1x1 == any(quant)
    assert model.config.scaling_factor == 0.25
    wanted, found = stock.encode(images).latent_dist.parameters, model.encode(images).latent_dist.parameters
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model.decode(z).sample, stock.decode(z).sample, rtol=1e-4, atol=1e-4)
    back = to_autoencoder_kl(model).state_dict()
    assert all(torch.equal(back[key], value) for key, value in stock.state_dict().items())
    assert to_autoencoder_kl(model).config.scaling_factor == 0.25


@torch.no_grad()
def test_a_decoder_alone_decodes_as_before(one_rule_of_groups):
    stock = kl(layers_per_block=1)
    model = decoder_from_kl(stock, size="S").eval()
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model.decode(z).sample, stock.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_every_key_has_its_place_at_the_widths_of_sd():
    with torch.device("meta"):
        widths = (128, 256, 512, 512)
        stock = kl(widths, groups=32)
        own = LiteVAE("sd-vae", conv1x1=True)
    for part in ("encoder", "decoder"):
        found = convert.part_from_kl(stock, part)
        wanted = getattr(own, part).state_dict()
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in wanted.items()}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"size": "S"}, "encoder is S"),
        ({"size": "sd-vae", "decoder_norm": "smc"}, "decoder_norm=smc"),
        ({"size": "sd-vae", "output": "wavelet"}, "output=wavelet"),
        ({"size": "sd-vae", "block_out_channels": (8, 8, 8, 8)}, r"block_out_channels=\[8, 8, 8, 8\]"),
    ],
)
def test_what_has_other_parts_is_refused_by_name(config, part):
    with torch.device("meta"):
        model = LiteVAE(**config)
    with pytest.raises(UserError, match=part):
        to_autoencoder_kl(model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mid_block_add_attention": False}, "no attention"),
        ({"act_fn": "relu"}, "activation relu"),
    ],
)
def test_another_architecture_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        litevae_from_kl(kl(**changed))


def test_other_groups_are_refused():
    model = LiteVAE("S", block_out_channels=TINY, layers_per_block=2, conv1x1=True)
    with pytest.raises(UserError, match="groups"):
        load_decoder(model, kl(groups=16))


def test_another_decoder_says_what_to_set():
    model = LiteVAE("S", block_out_channels=(8, 8, 16, 16), layers_per_block=1)
    with pytest.raises(UserError) as refused:
        load_decoder(model, kl())
    for field in ("model.decoder.channels=[32,64,64,64]", "model.decoder.layers=2", "model.conv1x1=true"):
        assert field in str(refused.value)
