"""Blurs and baselines, against a slow twin and by hand."""

import numpy as np
import pytest
import torch

from blocksight.engine.scoring.perturb import BASELINES, Perturbation, blurred, perturbation


def slow_blur(image: np.ndarray, sigma: float, reach: int, rim: str) -> np.ndarray:
    """A Gaussian window of one picture [H, W], pixel by pixel."""
    height, width = image.shape
    padded = np.pad(image, reach, mode="edge" if rim == "replicate" else "reflect")
    bell = [np.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-reach, reach + 1)]
    weights = [weight / sum(bell) for weight in bell]
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for down, own in enumerate(weights):
                for across, other in enumerate(weights):
                    result[row, column] += own * other * padded[row + down, column + across]
    return result


@pytest.mark.parametrize("rim", ["replicate", "reflect"])
@pytest.mark.parametrize(("sigma", "reach"), [(0.8, 2), (1.5, 3)])
def test_a_blur_is_a_gaussian_window(sigma, reach, rim):
    images = torch.rand(2, 3, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slow = [[slow_blur(channel.numpy(), sigma, reach, rim) for channel in image] for image in images]
    np.testing.assert_allclose(blurred(images, sigma, reach=reach, rim=rim).numpy(), np.stack(slow), atol=1e-14)


@pytest.mark.parametrize(("sigma", "reach"), [(0.1, 1), (1.0, 3), (1.5, 4), (1.7, 5)])
def test_a_blur_reaches_three_deviations_and_repeats_the_rim(sigma, reach):
    image = torch.rand(1, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slow = slow_blur(image[0].numpy(), sigma, reach, "replicate")
    np.testing.assert_allclose(blurred(image, sigma)[0].numpy(), slow, atol=1e-14)


class Adapter:
    """A model's adapter on one device, whose normalisation takes off a half."""

    def __init__(self, device):
        self.device = torch.device(device)

    def normalise(self, pictures):
        assert pictures.dtype == torch.uint8
        return pictures if pictures.is_meta else pictures / 255 - 0.5


@pytest.mark.parametrize(("name", "value"), [("zero", 0.0), ("black", -0.5)])
def test_a_baseline_is_one_pixel_on_the_adapters_device(name, value):
    pixel = BASELINES[name](Adapter("cpu"))
    assert pixel.shape == (1, 3, 1, 1)
    assert pixel.flatten().tolist() == [value] * 3
    assert BASELINES[name](Adapter("meta")).is_meta
    assert torch.equal(perturbation(Adapter("cpu"), name).baseline, pixel)


def test_a_masked_input_by_hand():
    inputs, mask = torch.tensor([[[[2.0, 4.0]]]]), torch.tensor([[[[0.25, 1.0]]]])
    assert Perturbation(torch.tensor(8.0))(inputs, mask).tolist() == [[[[6.5, 4.0]]]]
    assert Perturbation(torch.tensor(0.0))(inputs, mask).tolist() == [[[[0.5, 4.0]]]]
