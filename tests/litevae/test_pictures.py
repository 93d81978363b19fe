"""Grids and reconstruction pictures, pixel by pixel."""

import numpy as np
import torch

from litevae.images import to_tensor
from litevae.pictures import feature_map_picture, grid, latents_as_rgb, reconstruction_picture, strongest_maps


def test_grid_lays_images_out_row_by_row():
    images = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    sheet = grid(images, columns=3)
    assert sheet.shape == (2 + 2 * (4 + 2), 2 + 3 * (6 + 2), 3)
    assert [sheet[2, 2, 0], sheet[2, 10, 0], sheet[2, 18, 0], sheet[8, 2, 0], sheet[8, 10, 0]] == [10, 20, 30, 40, 50]
    assert (sheet[8:12, 18:24] == 255).all()  # the place that is left over
    assert (sheet[:2] == 255).all()
    assert (sheet == 10).all(axis=2).sum() == 4 * 6
    assert grid(images[:2], columns=8).shape == (8, 18, 3)


def test_latent_colours_are_the_first_principal_components():
    torch.manual_seed(0)
    # Three independent signals of different strength, turned into 6 channels.
    signals = torch.randn(2, 3, 16, 16) * torch.tensor([9.0, 3.0, 1.0]).view(1, 3, 1, 1)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0][:, :3]
    latents = torch.einsum("dc,nchw->ndhw", torch.tensor(rotation, dtype=torch.float32), signals) + 5
    rgb, name = latents_as_rgb(latents)
    assert name == "latent, PCA 1-3"
    assert rgb.shape == (2, 16, 16, 3)
    for component in range(3):
        inside = (rgb[..., component] > 0) & (rgb[..., component] < 255)  # what the percentiles do not clip
        signal = signals[:, component].numpy()[inside]
        assert abs(np.corrcoef(signal, rgb[..., component][inside])[0, 1]) > 0.97
    assert np.array_equal(rgb, latents_as_rgb(latents.clone())[0])


def test_few_latent_channels_are_shown_as_they_are():
    latents = torch.linspace(-1, 1, 100).view(1, 1, 10, 10)
    rgb, name = latents_as_rgb(latents.repeat(1, 3, 1, 1) * torch.tensor([1.0, 5.0, -1.0]).view(1, 3, 1, 1))
    assert name == "latent channels"
    ramp = np.clip((np.arange(100) - 0.99) / (98.01 - 0.99), 0, 1) * 255
    for channel, expected in enumerate((ramp, ramp, ramp[::-1])):
        assert np.abs(rgb[..., channel].ravel() - expected).max() <= 1
    grey, _ = latents_as_rgb(latents)
    assert (grey == grey[..., :1]).all()
    assert (latents_as_rgb(latents.repeat(1, 2, 1, 1))[0][..., 2] == 128).all()
    assert latents_as_rgb(torch.zeros(1, 4, 2, 2))[0].shape == (1, 2, 2, 3)  # a constant latent divides by nothing


def test_reconstruction_picture_has_four_labelled_columns():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    other = pixels.copy()
    other[1, :, :, 0] = np.where(pixels[1, :, :, 0] < 128, pixels[1, :, :, 0] + 10, pixels[1, :, :, 0] - 10)
    other[1, :, :, 1] ^= 128
    sheet = reconstruction_picture(to_tensor(pixels), to_tensor(other), torch.randn(2, 4, 8, 8))
    header, top, side = 16, 16 + 2, 128  # 64 pixels are shown at twice the size
    assert sheet.shape == (header + 2 + 2 * (side + 2), 2 + 4 * (side + 2), 3)
    second = top + side + 2
    cell = [sheet[second : second + side, 2 + k * (side + 2) :][:, :side] for k in range(4)]
    assert np.array_equal(cell[0][::2, ::2], pixels[1])
    assert np.array_equal(cell[1][::2, ::2], other[1])
    assert np.array_equal(cell[2][::16, ::16].repeat(16, 0).repeat(16, 1), cell[2])
    assert (cell[3] == [40, 255, 0]).all()  # 10 and 128 levels, times 4
    assert (sheet[top : top + side, 2 + 3 * (side + 2) :][:, :side] == 0).all()  # the first image is perfect
    for k in range(4):
        assert (sheet[:header, 2 + k * (side + 2) :][:, :side] < 128).any()  # a label


def test_strongest_maps_are_the_mean_and_the_channels_with_the_largest_maxima():
    maps = torch.zeros(2, 5, 4, 6)
    maps[0, 3, 1, 2], maps[0, 1, 0, 0], maps[0, 4] = -9, 5, 1
    maps[1, 0, 3, 5] = 2
    found = strongest_maps(maps.to(torch.bfloat16), channels=3)
    assert found.shape == (2, 4, 4, 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0], maps[0].abs().mean(0), rtol=1e-2, atol=1e-2)
    assert torch.equal(found[0, 1:], maps[0, [3, 1, 4]].abs())
    assert torch.equal(found[1, 1], maps[1, 0])
    assert strongest_maps(maps, channels=9).shape == (2, 6, 4, 6)


def test_feature_map_picture_scales_each_map_to_its_own_maximum():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    maps = torch.zeros(2, 3, 32, 32)  # half as many pixels as the image
    maps[1, 0], maps[1, 1, 5, 6], maps[1, 1, 7, 8] = 0.1, 40, 20
    sheet = feature_map_picture(to_tensor(pixels), maps)
    side, second = 128, 16 + 2 + 130
    assert sheet.shape == (16 + 2 + 2 * 130, 2 + 4 * 130, 3)
    cell = [sheet[second : second + side, 2 + k * 130 :][:, :side] for k in range(4)]
    assert np.array_equal(cell[0][::2, ::2], pixels[1])
    assert (cell[1] == 255).all()
    expected = np.zeros((32, 32), np.uint8)
    expected[5, 6], expected[7, 8] = 255, 128
    assert np.array_equal(cell[2][::4, ::4, 0], expected)
    assert (cell[3] == 0).all()
    for k in range(4):
        assert (sheet[:16, 2 + k * 130 :][:, :side] < 128).any()  # a label
