"""Small networks for the engine's tests, each with traits that a fast path may trip over.

`written_out` is the same network a second time, by hand and out of place: its logits, and the tensors at
which blocks must be found.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Written = tuple[Tensor, list[Tensor]]


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

    def written_out(self, x: Tensor) -> Written:
        maps = []
        for convolution in self.features[::3]:
            maps.append(convolution(x).relu())
            x = functional.max_pool2d(maps[-1], 2)
        return self.head(x.flatten(1)), maps


class Residual(nn.Module):
    """Shortcuts with and without a projection, functional in-place additions and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x), inplace=True)
        y = self.inner(x)
        y += x
        x = y.relu_()
        y = self.norm(self.down(x))
        y += self.project(x)
        return self.head(functional.relu_(y).mean((2, 3)))

    def written_out(self, x: Tensor) -> Written:
        x = self.stem(x).relu()
        first = (self.inner(x) + x).relu()
        last = (self.norm(self.down(first)) + self.project(first)).relu()
        return self.head(last.mean((2, 3))), [first, last]


class Depthwise(nn.Module):
    """Inverted bottleneck with a depthwise stride, squeeze-and-excitation, and activations of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(10, 10, 3, stride=2, padding=1, groups=10), nn.BatchNorm2d(10), nn.ReLU6(inplace=True)
        )
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 10, 1), nn.Hardsigmoid(inplace=True))
        self.project = nn.Conv2d(10, 4, 1)
        self.last = nn.Sequential(nn.Conv2d(4, 16, 1), nn.SiLU(inplace=True))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        x = self.project(x * self.squeeze(x))
        return self.head(self.last(x).mean((2, 3)))

    def written_out(self, x: Tensor) -> Written:
        first = functional.hardswish(self.expand[1](self.expand[0](x)))
        x = functional.relu6(self.depthwise[1](self.depthwise[0](first)))
        gate = functional.hardsigmoid(self.squeeze[1](x.mean((2, 3), keepdim=True)))
        last = functional.silu(self.last[0](self.project(x * gate)))
        return self.head(last.mean((2, 3))), [first, last]


class Curved(nn.Module):
    """Activations that are bent elsewhere than in 0, as modules; their inputs lie on both sides of the bends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.last = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.SiLU(inplace=True))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(8 * self.stem(8 * x)).mean((2, 3)))


class Pooled(nn.Module):
    """Feature maps, their means, one linear layer: there CAM is `sum_k W_ck A_k` (Zhou et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class InPlace(nn.Module):
    """Every functional way to overwrite a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.third = nn.Conv2d(10, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x *= 2
        x -= 0.05
        x = torch.relu_(x).add_(0.1)
        x = self.second(x)
        x /= 2
        x = functional.leaky_relu_(x, 0.1)
        x = self.third(x)
        x **= 2
        return self.head(torch.clamp_(x, max=4.0).mean((2, 3)))

    def written_out(self, x: Tensor) -> Written:
        first = (self.first(x) * 2 - 0.05).relu() + 0.1
        second = functional.leaky_relu(self.second(first) / 2, 0.1)
        third = (self.third(second) ** 2).clamp(max=4.0)
        return self.head(third.mean((2, 3))), [first, second, third]


class Untraceable(nn.Module):
    """Its path depends on the data, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if float(x.detach().sum()) < -1e9:
            x = -x
        return self.head(self.second(x).mean((2, 3)))

    def written_out(self, x: Tensor) -> Written:
        first = self.first[0](x).relu()
        last = self.second[0](first).relu()
        return self.head(last.mean((2, 3))), [first, last]


class Scaled(nn.Module):
    """The plain network with its logits far apart."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.factor = Plain(), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor

    def written_out(self, x: Tensor) -> Written:
        logits, maps = self.net.written_out(x)
        return logits * self.factor, maps


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network with seeded weights and batch statistics that let activations vary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.8, 1.3)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return net.eval()


def from_zoo(architecture: str, seed: int = 0) -> nn.Module:
    """A torchvision network with seven classes, its last layer scaled until scores differ as trained ones do."""
    import torchvision  # whose import takes two seconds of each process that jobs on the small networks start

    net = seeded(lambda: torchvision.models.get_model(architecture, num_classes=7), seed)
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight *= 2 / net(smooth(4, 64, 64)).std()
    return net


def smooth(count: int, height: int, width: int, seed: int = 1) -> Tensor:
    """Model inputs [N, 3, H, W] that vary slowly, as photographs do."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False) * 4 - 2


TRANSFORMERS_ONLY = {"daam", "legrad", "chefer", "libra"}
"""Explainers that need a network with attention."""


class Attending(nn.Module):
    """Self-attention, written out as transformers' own code does it, or left to torch's fused kernel."""

    def __init__(self, width: int, num_heads: int, *, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            taken = functional.scaled_dot_product_attention(query, key, value)
        else:
            weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
            taken = self.dropout(weights) @ value
        return self.proj(taken.transpose(1, 2).flatten(2))


class AttendingBlock(nn.Module):
    """A layer of a transformer."""

    def __init__(self, width: int, num_heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attending(width, num_heads, fused=fused)
        self.second_norm, self.wide = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.narrow(functional.gelu(self.wide(self.second_norm(x))))


class Transformer(nn.Module):
    """Two layers over patches of four pixels, without positions: it takes pictures of any size."""

    def __init__(self, *, prefix: int = 1, fused: bool = False, mirrored: bool = False) -> None:
        super().__init__()
        self.mirrored, self.num_prefix = mirrored, prefix
        self.project = nn.Conv2d(3, 12, 4, stride=4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 12))
        self.blocks = nn.ModuleList(AttendingBlock(12, 2, fused=fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)
        nn.init.normal_(self.head.weight)

    def tokens(self, x: Tensor) -> Tensor:
        """The class token and others [N, prefix], and the patches."""
        kernel = self.project.weight
        if self.mirrored:
            kernel = (kernel + kernel.flip(3)) / 2
        maps = functional.conv2d(x, kernel, self.project.bias, stride=4)
        return torch.cat([self.prefix.expand(x.shape[0], -1, -1), maps.flatten(2).transpose(1, 2)], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.num_prefix else x.mean(1))
