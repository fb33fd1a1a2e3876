"""Small networks for the engine's tests, each with one trait that a fast path may trip over."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Plain(nn.Module):
    """VGG-like, with in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for before, after in ((3, 6), (6, 8), (8, 10)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(10 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Residual(nn.Module):
    """A shortcut, a functional in-place addition and a functional in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x), inplace=True)
        y = self.inner(x)
        y += x
        x = self.down(y.relu_())
        return self.head(functional.relu(x).mean((2, 3)))


class Untraceable(nn.Module):
    """Its path depends on the data, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if float(x.detach().sum()) < -1e9:
            x = -x
        return self.head(self.second(x).mean((2, 3)))


def seeded(make, seed: int = 0) -> nn.Module:
    """The network with seeded weights and batch statistics that let activations vary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.3, 0.7)
    return net.eval()
