"""The encoder: the paper's exact sizes, shapes, reach of gradients; its variants."""

import pytest
import torch
import torch.nn.functional as F

from litevae.encoder import SIZES, Encoder
from litevae.errors import UserError
from litevae.features import NAFBlock, NAFNet, ViT
from litevae.wavelet import idwt

# ../paper: Tables 2 and 3; worked out to the last digit from Appendix G, for n_z = 4 and 12
PARAMETERS = {
    "S": (1_038_308, 1_040_628),
    "B": (6_753_252, 6_757_876),
    "M": (32_752_740, 32_757_364),
    "L": (41_424_996, 41_434_228),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_papers(size):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Encoder(n_z, SIZES[size]).parameters()) for n_z in (4, 12)]
    assert counts == list(PARAMETERS[size])


@pytest.mark.parametrize("downsample", ["conv", "pool"])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_moments_are_an_eighth_of_the_image(downsample, wavelet):
    encoder = Encoder(4, SIZES["S"], wavelet, downsample)
    assert encoder(torch.randn(2, 3, 64, 40)).shape == (2, 8, 8, 5)


def test_pooling_has_no_parameters():
    """Two 3x3 convolutions 12 -> 12 less."""
    conv, pool = (sum(p.numel() for p in Encoder(4, SIZES["S"], downsample=d).parameters()) for d in ("conv", "pool"))
    assert conv - pool == 2 * (12 * 12 * 9 + 12)


def randomize(module: torch.nn.Module, std: float = 0.1) -> None:
    """Blocks add nothing at the start, and gradients stop at their last layer."""
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)


@pytest.mark.parametrize("variant", [{}, {"extractor": "nafnet"}, {"aggregator": "vit"}])
def test_every_level_and_every_parameter_is_used(variant):
    encoder = Encoder(4, SIZES["S"], **variant)
    randomize(encoder)
    encoder(torch.randn(1, 3, 32, 32)).square().sum().backward()
    silent = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_the_transform_keeps_a_graph_only_for_an_image_that_wants_a_gradient(monkeypatch):
    import litevae.encoder

    kept = []
    pyramid = litevae.encoder.wavelet_pyramid

    def look(x, name):
        kept.append([bands.requires_grad for bands in pyramid(x, name)])
        return pyramid(x, name)

    monkeypatch.setattr(litevae.encoder, "wavelet_pyramid", look)
    for wanted in (False, True):
        x = torch.randn(1, 3, 32, 32, requires_grad=wanted)
        Encoder(4, SIZES["S"])(x).sum().backward()
        assert (x.grad is not None) == wanted
    assert kept == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("wavelet", ["haar", "db2"])  # Haar only adds; db2 is a convolution, which autocast takes
def test_the_transform_stays_in_fp32_under_autocast(wavelet, monkeypatch):
    import litevae.encoder

    seen = []
    pyramid = litevae.encoder.wavelet_pyramid

    def look(x, name):
        seen.extend(pyramid(x, name))
        return seen[-3:]

    monkeypatch.setattr(litevae.encoder, "wavelet_pyramid", look)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(4, SIZES["S"], wavelet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(x)
        encoder(x.bfloat16())
    for found, given in ((seen[:3], x), (seen[3:], x.bfloat16().float())):
        assert {bands.dtype for bands in found} == {torch.float32}
        for bands, expected in zip(found, pyramid(given, wavelet), strict=True):
            assert torch.equal(bands, expected)


@pytest.mark.parametrize("variant", [{}, {"extractor": "nafnet"}, {"aggregator": "vit"}, {"levels": [3]}])
def test_starts_with_a_small_posterior(variant):
    torch.manual_seed(0)
    logvar = Encoder(4, SIZES["S"], **variant)(torch.randn(1, 3, 64, 64).clamp(-1, 1)).chunk(2, dim=1)[1]
    assert -8 < logvar.mean() < -4


def test_a_bad_size_is_refused():
    with pytest.raises(UserError, match="multiple of 8"):
        Encoder(4, SIZES["S"])(torch.zeros(1, 3, 36, 32))


# --- variants


@torch.no_grad()
def test_a_shared_extractor_is_three_equal_ones():
    shared, separate = Encoder(4, SIZES["S"], shared_extractor=True), Encoder(4, SIZES["S"])
    randomize(shared)
    state = shared.state_dict()
    for key in [key for key in state if key.startswith("extractors.0.")]:
        state |= {key.replace(".0.", f".{n}.", 1): state[key] for n in (1, 2)}
    separate.load_state_dict(state)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(shared(x), separate(x))


@torch.no_grad()
@pytest.mark.parametrize("levels", [[1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3]])
def test_an_encoder_sees_its_levels_and_no_others(levels):
    """A change of one level's details, and of nothing above or below it. Level l's LL holds what is coarser."""
    encoder = Encoder(4, SIZES["S"], levels=levels).double()
    randomize(encoder)
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    before = encoder(x)
    assert before.shape == (1, 8, 4, 4)
    for level in (1, 2, 3):
        change = torch.randn(1, 12, 32 >> level, 32 >> level, dtype=torch.double)
        change[:, :3] = 0
        for n in reversed(range(level)):
            change = idwt(change)
            if n:
                change = torch.cat([change, torch.zeros(1, 9, *change.shape[-2:], dtype=torch.double)], dim=1)
        # (the transform is computed in fp32, so what is not seen differs by rounding)
        assert ((encoder(x + change) - before).abs().max() > 1e-2) == any(seen <= level for seen in levels)


@pytest.mark.parametrize(("latent_channels", "count"), [(4, 832_464), (12, 839_152)])
def test_the_vit_has_the_papers_parameters(latent_channels, count):
    """Table 20: ViT 0.84 M, UNet 1.69 M."""
    with torch.device("meta"):
        unet, vit = (Encoder(latent_channels, SIZES["B"], aggregator=kind).aggregator for kind in ("unet", "vit"))
    assert sum(p.numel() for p in vit.parameters()) == count
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 1.7


@torch.no_grad()
def test_the_vits_positions_are_interpolated_elsewhere():
    small, large = ViT(6, 4, 32, grid=4).eval(), ViT(6, 4, 32, grid=8).eval()
    randomize(small)
    state = small.state_dict()
    x = torch.randn(2, 6, 8, 8)
    large.load_state_dict(state | {"positions": F.interpolate(state["positions"], size=8, mode="bicubic")})
    assert torch.equal(small(x), large(x))
    large.positions.zero_()
    assert not torch.allclose(small(x), large(x), atol=1e-3)
    assert small(torch.randn(1, 6, 3, 5)).shape == (1, 4, 3, 5)


def test_every_output_of_the_vit_depends_on_every_position():
    vit = ViT(6, 4, 32, grid=4)
    randomize(vit)
    x = torch.randn(1, 6, 4, 4, requires_grad=True)
    vit(x)[0, 0, 0, 0].backward()
    assert (x.grad.abs().sum(dim=1) > 0).all()


@torch.no_grad()
def test_a_nafblock_is_its_papers_equations():
    block = NAFBlock(4)
    randomize(block, 0.5)
    x = torch.randn(2, 4, 5, 6)

    def normed(x, norm):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    def linear(x, conv):
        return torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x) + conv.bias.view(-1, 1, 1)

    h = F.pad(linear(normed(x, block.norm1), block.expand1), (1, 1, 1, 1))
    w = block.depthwise.weight[:, 0]
    h = sum(w[:, i, j].view(-1, 1, 1) * h[..., i : i + 5, j : j + 6] for i in range(3) for j in range(3))
    h = h + block.depthwise.bias.view(-1, 1, 1)
    h = h[:, :4] * h[:, 4:]
    h = h * linear(h.mean(dim=(2, 3), keepdim=True), block.scale)
    y = x + block.beta * linear(h, block.project1)
    h = linear(normed(y, block.norm2), block.expand2)
    y = y + block.gamma * linear(h[:, :4] * h[:, 4:], block.project2)
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=1e-4)


def test_a_nafnet_is_as_wide_and_as_deep_as_the_unet():
    net = NAFNet(12, 12, 32, (1, 2, 3))
    assert (len(net.blocks), net.conv_in.out_channels) == (14, 96)
