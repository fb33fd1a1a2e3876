"""Efficiency: the bare model's time for as many forward passes, divided by the explainer's time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.explainers import Explainer
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import while_it_fits
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.forward import in_place, make_forward
from blocksight.engine.scoring.setting_choice import measured_seconds, rate, repeated_inputs

CPU_SIZES, GPU_SIZES = (1, 2, 4, 8, 16, 32), (32, 64, 128, 256, 512, 1024)
"""Batch sizes at which the bare model is timed."""
ROUNDS = 3
"""Bare model and explainer take turns, so that other work of the machine slows both."""
BARE_SECONDS = 1.0
"""Least time of the bare model in each turn."""


@dataclass(frozen=True)
class Efficiency:
    """One explainer around one model on one device.

    Seconds are of CPU time on a CPU, and of wall time on a GPU.
    """

    bare_rates: dict[int, float]
    """Forward passes of the bare model by batch size, in the explainer's precision and compile mode."""
    best_bare_rate: float
    """The rate at the best of these sizes, in turns with the explainer."""
    images: int
    forwards_per_image: float
    """Masked forwards."""
    seconds_per_image: float
    """From normalised pixels to the finished map, gradient pass and fusion included; the median round."""
    efficiency: float | None
    """Masked forwards x bare time / total time: the median of the rounds' ratios, 1 at best; None without any."""

    @property
    def forward_rate(self) -> float:
        """Masked forwards per second of the explainer's whole time."""
        return self.forwards_per_image / self.seconds_per_image if self.forwards_per_image else 0.0


def bare_rates(adapter: ModelAdapter, setting: ForwardSetting) -> Iterator[tuple[int, float]]:
    """The bare model's forward passes per second at each batch size that fits, in the setting's precision and mode."""
    sizes = CPU_SIZES if adapter.device.type == "cpu" else GPU_SIZES
    with adapter.borrowed(), torch.inference_mode(), while_it_fits():
        for size in sizes:
            inputs = torch.rand(size, 3, *adapter.input_size, device=adapter.device)
            yield size, rate(make_forward(adapter, replace(setting, batch_size=size)), inputs, size)


def measure(
    explainer: Explainer,
    inputs_nchw: Tensor,
    setting: ForwardSetting,
    rates: dict[int, float],
    update: Callable[[], None],
    target: Target,
) -> tuple[Efficiency, list[list[Explanation]]]:
    """Times the explainer of this target in turns with the bare model at the best size; calls `update` after each turn.

    `setting` is the explainer's forward setting. Also returns the explanations.
    """
    adapter = explainer.adapter
    best = max(rates, key=rates.__getitem__)
    with adapter.borrowed(), torch.inference_mode():
        bare = make_forward(adapter, replace(setting, batch_size=best))
    batch = in_place(bare, repeated_inputs(inputs_nchw, best))
    count = max(1, round(BARE_SECONDS * rates[best] / best))
    explained: list[list[Explanation]] = []

    def run_bare() -> None:
        with adapter.borrowed(), torch.inference_mode():
            for _ in range(count):
                bare(batch)

    def run_explainer() -> None:
        explained[:] = explainer.explain(inputs_nchw, target)

    on_gpu = adapter.device.type == "cuda"
    if on_gpu:
        run_explainer()  # chooses kernels and takes memory
    turns = []
    for _ in range(ROUNDS):
        turns.append(
            (count * best / measured_seconds(run_bare, on_gpu=on_gpu), measured_seconds(run_explainer, on_gpu=on_gpu))
        )
        update()
    num_forwards = sum(own[0].num_forwards for own in explained)
    found = Efficiency(
        rates,
        best_bare_rate=median(one for one, _ in turns),
        images=len(inputs_nchw),
        forwards_per_image=num_forwards / len(inputs_nchw),
        seconds_per_image=median(seconds for _, seconds in turns) / len(inputs_nchw),
        efficiency=median(num_forwards / one / seconds for one, seconds in turns) if num_forwards else None,
    )
    return found, explained
