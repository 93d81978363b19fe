"""Transforms of images and latents together."""

import numpy as np
import pytest
import torch
from PIL import Image

from litevae.equivariance import SpatialTransform, draw_scale, draw_transform


def test_the_identity_changes_nothing():
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(SpatialTransform().images(x), x)
    assert torch.equal(SpatialTransform().latents(x), x)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotations_are_numpys(turns):
    x = torch.rand(2, 3, 8, 16)
    found = SpatialTransform(turns=turns).images(x)
    np.testing.assert_array_equal(found, np.rot90(x.numpy(), turns, axes=(2, 3)))


def test_smaller_images_are_pillows():
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    found = SpatialTransform(0.375).images(x)
    expected = Image.fromarray(x[0, 0].numpy()).resize((24, 24), Image.Resampling.BILINEAR)  # with antialiasing
    np.testing.assert_allclose(found[0, 0], np.array(expected), atol=1e-5)


@pytest.mark.parametrize("scale", [0.25, 0.3, 0.5, 0.99])
def test_sides_of_images_are_those_of_the_latents_times_the_factor(scale):
    transform = SpatialTransform(scale, 1)
    z, x = transform.latents(torch.rand(1, 4, 5, 9)), transform.images(torch.rand(1, 3, 40, 72))
    assert [8 * side for side in z.shape[-2:]] == list(x.shape[-2:])
    smallest = SpatialTransform(0.01)
    assert smallest.latents(torch.rand(1, 4, 5, 9)).shape[-2:] == (1, 1)


def test_an_equivariant_autoencoder_decodes_what_the_image_becomes():
    """Here the latents of an image are the means of its blocks, which the decoder repeats; they rise evenly."""
    rise = torch.linspace(0, 1, 8)
    z = (rise[:, None] + 2 * rise).repeat(1, 3, 1, 1)
    x = z.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    for transform in (SpatialTransform(turns=3), SpatialTransform(0.5), SpatialTransform(0.5, 1)):
        latents = transform.latents(z)
        blocks = torch.nn.functional.avg_pool2d(transform.images(x, 4), 4)
        assert blocks.shape == latents.shape
        # Within a block, resizing blurs the edges; at the border it sees only one side.
        torch.testing.assert_close(blocks[..., 1:-1, 1:-1], latents[..., 1:-1, 1:-1], atol=0.02, rtol=0)


def test_scales_are_drawn_as_often_as_each_other():
    random = np.random.default_rng(0)
    drawn = [draw_transform(random, 32) for _ in range(2400)]
    scales, counts = np.unique([transform.scale for transform in drawn], return_counts=True)
    assert [round(32 * scale) for scale in scales] == list(range(8, 32))  # EQ-VAE: 8 / 32 to 31 / 32
    assert counts.min() > 60 < 140 > counts.max()
    assert {transform.turns for transform in drawn} == {1, 2, 3}


def test_latents_that_can_not_be_smaller_are_only_rotated():
    random = np.random.default_rng(0)
    assert draw_scale(random, 1) == draw_scale(random, 4, 1.0) == 1.0
    assert draw_transform(random, 1).turns in (1, 2, 3)
    assert {draw_scale(random, 3, 0.5) for _ in range(20)} == {2 / 3}
