"""Our own pipeline: the same images as LDM.sample, from the folders that save_ldm writes."""

import numpy as np
import pytest
import torch

from litevae.errors import UserError
from litevae.ldm import save_ldm
from litevae.pipeline import LatentDiffusionPipeline
from tests.litevae.test_ldm import LABELS, MODELS, make


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    network, classes, objective = MODELS[request.param]
    ldm = make(network, classes, objective)
    save_ldm(folder, ldm)
    return folder, ldm, classes


def opened(folder, **options):
    pipeline = LatentDiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_draws_what_ldm_sample_draws(made):
    folder, ldm, classes = made
    pipeline = opened(folder)
    for guidance in (1.0, 3.0) if classes else (1.0,):
        ours = {"class_labels": LABELS, "guidance_scale": guidance} if classes else {}
        theirs = {"labels": LABELS, "guidance": guidance} if classes else {}
        expected = ldm.sample([3, (4, 1)], steps=5, **theirs) / 2 + 0.5
        images = pipeline(seeds=[3, (4, 1)], num_inference_steps=5, output_type="pt", **ours).images
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
        assert images.std() > 0.05


def test_bf16_draws_nearly_the_same(made):
    folder, _, classes = made
    pipeline = opened(folder, torch_dtype=torch.bfloat16)
    assert pipeline.network.dtype == pipeline.autoencoder.dtype == torch.bfloat16
    labels = {"class_labels": LABELS} if classes else {}
    found = pipeline(seeds=[3, 4], num_inference_steps=2, output_type="pt", **labels).images
    expected = opened(folder)(seeds=[3, 4], num_inference_steps=2, output_type="pt", **labels).images
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    save_ldm(folder, make("dit", 5))
    return opened(folder)


def test_outputs_callbacks_and_noise(pipeline):
    seen = []

    def look(_, number, time, tensors):
        seen.append((number, int(time)))
        return {"latents": torch.zeros_like(tensors["latents"])} if number == 1 else None

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"class_labels": LABELS, "num_inference_steps": 2}
    generated = pipeline(generator=torch.Generator().manual_seed(0), output_type="np", **options).images
    np.testing.assert_array_equal(generated, pipeline(latents=x, output_type="np", **options).images)
    assert generated.shape == (2, 64, 64, 3)
    pictures = pipeline(latents=x, **options).images
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    np.testing.assert_array_equal(np.asarray(pictures[0]), (generated[0] * 255).round().astype(np.uint8))
    (latent,) = pipeline(latents=x, output_type="latent", return_dict=False, callback_on_step_end=look, **options)
    assert torch.equal(latent, torch.zeros(2, 4, 8, 8))
    assert [number for number, _ in seen] == [0, 1]
    assert len(pipeline(batch_size=3, num_inference_steps=1, output_type="pt").images) == 3
    assert len(pipeline(2, batch_size=2, num_inference_steps=1, output_type="pt").images) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": [1], "seeds": [1, 2]}, "are for 1 and 2 images"),
        ({"class_labels": [-1]}, "class -1 does not exist"),
        ({"guidance_scale": 2.0}, "needs class_labels"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "but the model's are"),
        ({"output_type": "jpeg"}, "output_type=jpeg does not exist"),
        ({"sampler": "euler"}, "does not fit a model of epsilon"),
    ],
)
def test_what_it_refuses(pipeline, given, message):
    with pytest.raises(UserError, match=message):
        pipeline(**given)


def test_saved_by_diffusers_it_comes_back(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = opened(tmp_path)
    options = {"class_labels": LABELS, "seeds": [1, 2], "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(again(**options).images, pipeline(**options).images)
