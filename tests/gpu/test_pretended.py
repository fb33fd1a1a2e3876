"""The pretended GPU itself: it raises where CUDA raises, and counts what makes a host wait."""

import copy

import pytest
import torch
from torch import nn

from tests.gpu.pretended import DeviceMismatchError, pretended_gpu


def test_tensors_of_two_devices_do_not_mix():
    with (
        pretended_gpu(),
        pytest.raises(DeviceMismatchError, match=r"add got tensors on cuda:0, and on the CPU .*\(3,\)"),
    ):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_a_parameter_on_the_cpu_does_not_meet_inputs_on_the_gpu():
    with pretended_gpu(), pytest.raises(DeviceMismatchError):
        nn.Linear(3, 2)(torch.ones(1, 3, device="cuda"))


def test_a_scalar_of_the_cpu_mixes_as_cuda_lets_it():
    with pretended_gpu():
        assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).tolist() == [2, 2, 2]


def test_numpy_takes_no_tensor_of_the_gpu():
    with pretended_gpu(), pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(3, device="cuda").numpy()


def test_a_generator_of_the_cpu_draws_nothing_on_the_gpu():
    with pretended_gpu(), pytest.raises(DeviceMismatchError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())


def test_a_function_that_it_does_not_know_is_named():
    with pretended_gpu(), pytest.raises(NotImplementedError, match="hann_window"):
        torch.hann_window(3, device="cuda")


def waits_of(work) -> int:
    with pretended_gpu() as counts:
        values = torch.arange(4.0, device="cuda")
        counts.clear()
        work(values)
        return counts.waits.total()


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda values: values + 1, 0),
        (lambda values: values[1:], 0),
        (lambda values: values.sum().item(), 1),
        (lambda values: bool((values > 1).all()), 1),
        (lambda values: values.tolist(), 1),
        (lambda values: values.cpu(), 1),
        (lambda values: values[values > 1], 1),
        (lambda values: values.nonzero(), 1),
        (lambda values: values[torch.tensor([0, 2])], 1),
        (lambda values: values[torch.zeros(1, dtype=torch.int64, device="cuda")], 0),
        (lambda values: values.copy_(torch.ones(4)), 1),
        (lambda _: torch.tensor([1.0, 2.0], device="cuda"), 1),
        (lambda _: torch.ones(4).pin_memory().to("cuda", non_blocking=True), 0),
        (lambda _: torch.cuda.synchronize(), 1),
    ],
)
def test_what_makes_the_host_wait_is_counted(work, waits):
    assert waits_of(work) == waits


def test_launches_and_bytes_are_counted():
    with pretended_gpu() as counts:
        values = torch.ones(5, dtype=torch.float32).to("cuda")
        (values.view(5, 1).expand(5, 2) * 2).double().cpu()
        assert (counts.h2d_bytes, counts.d2h_bytes) == (20, 80)
        assert sorted(line.rpartition(" ")[2] for line in counts.launches) == ["_to_copy", "mul"]
        with counts.paused():
            values + 1
        assert counts.launches.total() == 2


def test_gradients_stay_on_the_gpu():
    with pretended_gpu():
        values = torch.ones(3, device="cuda", requires_grad=True)
        (slope,) = torch.autograd.grad((values**2).sum(), values)
        assert slope.device.type == "cuda"
        assert slope.tolist() == [2, 2, 2]


def test_a_model_moves_and_is_copied():
    with pretended_gpu():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().to("cuda")
        again = copy.deepcopy(net)
        assert {tensor.device.type for tensor in again.state_dict().values()} == {"cuda"}
        assert again(torch.ones(1, 3, 5, 5, device="cuda")).device.type == "cuda"


def test_a_graph_is_recorded_once_and_replayed_into_the_same_memory():
    with pretended_gpu() as counts:
        inputs, weight = torch.ones(3, device="cuda"), torch.full((3,), 2.0, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total = (inputs * weight).view(3, 1).add_(1).sum()
        inputs.copy_(torch.full((3,), 5.0, device="cuda"))
        counts.clear()
        graph.replay()
        assert counts.launches.total() == 1
        assert total.item() == 33


def test_afterwards_nothing_is_left():
    with pretended_gpu():
        pass
    assert torch.ones(3).device.type == "cpu"
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
