"""What is said when the statistics in a model's config are not those of a cache's latents."""

import pytest

from pipelines.encoding.model_statistics import disagreement

MODEL = {"_class_name": "LiteVAE", "latents_mean": [1.0, -2.0], "latents_std": [2.0, 0.5], "scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([1.0, -2.0], [2.0, 0.5]),
        ([1.09, -2.024], [2.09, 0.476]),  # each by less than 5 %
        ([1.0, -3.0], [2.0, 0.0]),  # a constant channel, which is said elsewhere
        ([1.0, 1.0], [0.0, 0.0]),  # all latents are equal
    ],
)
def test_nothing_is_said_of_what_agrees(mean, std):
    assert disagreement(MODEL, mean, std) == ""


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([1.0, -2.0], [2.2, 0.5], "in 1 of 2 channels by more than 5%, most in channel 0 (from 0), whose standard"),
        ([1.0, -2.0], [2.0, 0.47], "whose standard deviation is 0.94 times the model's and whose mean is off by 0 of"),
        (
            [1.0, -1.95],
            [2.0, 0.5],
            "channel 1 (from 0), whose standard deviation is 1 times the model's and whose mean",
        ),
        ([1.0, -1.95], [2.0, 0.5], "is off by 0.1 of it"),
        ([1.2, -1.9], [2.0, 0.5], "in 2 of 2 channels"),
        ([1.0], [2.0], "the config has statistics of 2 channels, the cache has 1"),
        # Means 0 and 2, standard deviations 1: the variance over all is 1 + 1.
        (
            [0.0, 2.0],
            [1.0, 1.0],
            "pipelines of diffusers take the model's, and need scaling_factor=0.7071 shift_factor=1 ",
        ),
    ],
)
def test_the_worst_channel_is_named(mean, std, said):
    assert said in disagreement(MODEL, mean, std)


def test_a_model_with_a_scaling_factor_only():
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.2, "latents_mean": None, "latents_std": None}
    assert disagreement(config, [0.0, 0.0], [5.2, 5.2]) == ""
    assert "the standard deviation is 1.1 times 1 / scaling_factor" in disagreement(config, [0.0, 0.0], [5.5, 5.5])


def test_a_model_without_statistics():
    said = disagreement({"_class_name": "LiteVAE", "scaling_factor": 1.0}, [3.0], [2.0])
    assert said.startswith("the model's config has none")
    assert "scaling_factor=0.5 shift_factor=3." in said
    assert disagreement({"_class_name": "VQModel"}, [3.0], [2.0]) == ""
