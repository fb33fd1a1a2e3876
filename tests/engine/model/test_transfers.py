"""Copies to and from a device: values, shapes, and how often the host waits."""

import pytest
import torch

from blocksight.engine.model.transfers import to_device, to_host, together
from tests.gpu.pretended import pretended_gpu


def made(device: str) -> list[torch.Tensor]:
    return [torch.arange(6.0, device=device).view(2, 3), torch.tensor([True, False]).to(device)]


def test_values_come_to_the_host_as_float64_in_one_copy():
    wanted = [own.double() for own in made("cpu")]
    with pretended_gpu() as counts:
        tensors = made("cuda")
        counts.clear()
        found = to_host(tensors)
        assert counts.waits.total() == 1
    for own in (found, to_host(made("cpu"))):
        assert all(torch.equal(*pair) for pair in zip(own, wanted, strict=True))
        assert {one.dtype for one in own} == {torch.float64}


def test_indices_go_to_a_gpu_in_one_copy_without_a_wait():
    tensors = [torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    with pretended_gpu() as counts:
        found = to_device(tensors, torch.device("cuda"))
        assert (counts.waits.total(), counts.copies.total()) == (0, 1)
        assert [own.tolist() for own in found] == [[2, 0], [], [1]]
    assert to_device(tensors, torch.device("cpu")) == tensors


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_moved(device: str):
    assert to_host([]) == []
    assert to_device([], torch.device(device)) == []


def test_images_are_computed_together_on_a_gpu_alone():
    assert together(3, torch.device("cuda")) == [range(3)]
    assert together(3, torch.device("cpu")) == [range(1), range(1, 2), range(2, 3)]
