"""FovEx: the places of a blurred picture that must be sharp for the model to recognise the class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocksight.engine.catalog.side_products import Fixation, SideProducts
from blocksight.engine.explainers.explainer import Explainer, chunks
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import Grid, grid_of
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.perturb import blurred

VIEWS_PER_PASS = {"cuda": 32}
"""Views per forward by kind of device, for every `batch_size`. A step follows the sign of a gradient, so rounding,
which differs between batch sizes, could change a path."""
DEFAULT_VIEWS_PER_PASS = 4
"""Views per forward on other devices."""
BLUR_REACH = 2
"""Radius of the blur in deviations: 41 x 41 pixels for a deviation of 10."""
JITTER = 0.05
"""Largest random move of a place without progress, if there are no restarts."""


def fovea(places_n2: Tensor, squared_reach: float, size: Grid) -> Tensor:
    """`G_p(z) = exp(-|z - p|^2 / s)` around places (row, column) on a picture of [-1, 1] x [-1, 1], [N, H, W].

    The first and the last pixel of an axis lie at -1 and 1.
    """
    down, across = (
        torch.exp(
            -((torch.linspace(-1, 1, side, dtype=places_n2.dtype, device=places_n2.device) - own[:, None]) ** 2)
            / squared_reach
        )
        for side, own in zip(size, places_n2.unbind(1), strict=True)
    )
    return down[:, :, None] * across[:, None, :]


def foveated(sharp: Tensor, blurry: Tensor, earlier: Tensor, current: Tensor) -> Tensor:
    """`x + (x_b - x) clip(1 - R - G_p, 0, 1)`: images [N, 3, H, W] under R and G_p [N, H, W]."""
    return sharp + (blurry - sharp) * (1 - earlier - current).clamp(0, 1)[:, None]


@dataclass(frozen=True)
class Views:
    """One full batch of images, each for one of its targets."""

    logits: Callable[[Tensor], Tensor]
    sharp: Tensor
    """[B, 3, H, W], in the model's precision; places and views are float64."""
    blurry: Tensor
    """The same, blurred."""
    target: Target
    indices: Tensor
    """The target number of each, [B]."""

    def losses(self, places: Tensor, squared_reach: float, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropies [B] of the targets under foveas at places [B, 2], and their gradients by the places."""
        with torch.enable_grad():
            own = places.detach().requires_grad_(True)
            current = fovea(own, squared_reach, grid_of(self.sharp))
            views = foveated(self.sharp.double(), self.blurry, earlier, current)
            losses = self._cross_entropy(self.logits(views.to(self.sharp.dtype)))
        (slopes,) = torch.autograd.grad(losses.sum(), own)
        return losses.detach(), slopes

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        """`log sum exp z - z_c`, z_c the target's raw score: minus the logarithm of a class's probability.

        Of a target that is no class: minus its score.
        """
        every = torch.arange(len(logits), device=logits.device)
        own = self.target.raw.score(logits, every)[every, self.indices]
        if all(self.target.is_class):
            return logits.double().logsumexp(1) - own
        is_class = torch.tensor(self.target.is_class, device=own.device)[self.indices]
        return torch.where(is_class, logits.double().logsumexp(1), 0.0) - own


class FovEx(Explainer):
    """`M <- decay M + G_p` over the fixations (Panda et al., arXiv 2408.02123), with the constants of their code.

    Each fixation takes K steps down the class's cross entropy, by the sign of its gradient, from the centre of the
    picture and within it. The place of the least loss is kept; the next fixation sees it partly sharp. Blurring the
    model's inputs equals blurring pixels, for both are linear.
    """

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        jobs = [(image, index) for image in range(len(inputs_nchw)) for index in range(target.num_targets)]
        blurs = [self._blurred(one) for one in inputs_nchw]
        draws = [self._draws(seed) for seed in seeds]
        paths: list[list[list[Fixation]]] = [[] for _ in inputs_nchw]
        size = VIEWS_PER_PASS.get(self.adapter.device.type, DEFAULT_VIEWS_PER_PASS)
        for batch in chunks(jobs, size):
            images, indices = zip(*batch, *batch[-1:] * (size - len(batch)), strict=True)
            chosen = torch.tensor(images, device=inputs_nchw.device)
            blurry = torch.stack([blurs[image] for image in images])
            which = torch.tensor(indices, device=inputs_nchw.device)
            views = Views(self.adapter.logits, inputs_nchw[chosen], blurry, target.of(chosen), which)
            found = self._fixations(views, torch.stack([draws[image] for image in images], 2).to(blurry.device))
            for (image, _), path in zip(batch, found, strict=False):
                paths[image].append([Fixation(*one) for one in path])
        return [
            [self._explanation(*one, grid_of(inputs_nchw), target.num_targets) for one in zip(own, row, strict=True)]
            for own, row in zip(paths, self._scores(inputs_nchw, target), strict=True)
        ]

    def _blurred(self, image_chw: Tensor) -> Tensor:
        """The blurred image in float64; it is mirrored at its border."""
        reach = min(round(BLUR_REACH * self.parameters.blur), *(side - 1 for side in grid_of(image_chw)))
        return blurred(image_chw.double(), self.parameters.blur, reach=max(1, reach), rim="reflect")

    def _draws(self, seed: int) -> Tensor:
        """An image's random places [S, K, 2] in [-1, 1], always drawn, needed or not."""
        shape = (self.parameters.fixations, self.parameters.steps, 2)
        return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1

    def _fixations(self, views: Views, draws: Tensor) -> list[list[list[float]]]:
        """For each of B views the row, column and loss of every fixation; `draws` are [S, K, B, 2]."""
        earlier = views.blurry.new_zeros(len(views.blurry), *grid_of(views.blurry))
        found = []
        for random_places in draws:
            places, losses = self._best_place(views, earlier, random_places)
            current = fovea(places, self.parameters.fovea, grid_of(earlier))
            earlier = self.parameters.memory * earlier + current
            found.append(torch.cat([places, losses[:, None]], 1))
        return torch.stack(found, 1).tolist()

    def _best_place(self, views: Views, earlier: Tensor, random_places: Tensor) -> tuple[Tensor, Tensor]:
        """The place [B, 2] of each view's least loss in K steps, and that loss [B]; NaN if no loss was a number."""
        parameters = self.parameters
        places = torch.zeros_like(random_places[0])
        best_places, best_losses = torch.full_like(places, float("nan")), places.new_full((len(places),), float("inf"))
        for drawn in random_places:
            losses, slopes = views.losses(places, parameters.fovea, earlier)
            stepped = (places - parameters.rate * slopes.sign()).clamp(-1, 1)
            is_better = losses < best_losses
            kept = stepped if parameters.best == "official" else places
            best_places = torch.where(is_better[:, None], kept, best_places)
            best_losses = torch.where(is_better, losses, best_losses)
            other = drawn if parameters.restarts else (stepped + JITTER * drawn).clamp(-1, 1)
            places = torch.where(is_better[:, None], stepped, other)
        return best_places, best_losses

    def _explanation(self, path: list[Fixation], score: float, size: Grid, num_targets: int) -> Explanation:
        parameters = self.parameters
        places = torch.tensor([[one.row, one.column] for one in path], dtype=torch.float64)
        total = torch.zeros(size, dtype=torch.float64)
        for heat in fovea(places, parameters.heat, size):
            total = parameters.decay * total + heat
        forwards = parameters.fixations * parameters.steps * num_targets
        products = SideProducts(scan_path=tuple(path))
        return checked_explanation(total.numpy(), score, num_forwards=forwards, products=products)
