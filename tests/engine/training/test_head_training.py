"""Training: independent of who computes a shard, resumable bit by bit, and on planted evidence right."""

import hashlib
from collections.abc import Iterator

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import upsampling
from blocksight.engine.training.attention_head import AttentionHead, HeadShape
from blocksight.engine.training.feature_maps import AuxiliaryFeatures, FeatureMaps, OwnFeatures
from blocksight.engine.training.head_training import (
    NUM_SHARDS,
    SHARD_SIZE,
    HeadTraining,
    Recipe,
    one_cycle,
)
from blocksight.engine.training.mask_loss import LABELS, LossWeights
from tests.engine import planted

QUICK = Recipe("adamw", 1e-2, 5e-4, LossWeights(smoothness=0.0), "zero", keeps_own=False)


def started(features: FeatureMaps, adapter: ModelAdapter, num_steps: int = 6, recipe: Recipe = QUICK) -> HeadTraining:
    shape = HeadShape(features.shapes, adapter.num_classes, has_bias=True, doubles=False)
    return HeadTraining(adapter, features, AttentionHead(shape, 0), recipe, num_steps)


def of_cnn(num_steps: int = 6, recipe: Recipe = QUICK) -> HeadTraining:
    adapter = planted.trained_cnn()
    return started(OwnFeatures(adapter), adapter, num_steps, recipe)


def images(step: int) -> Tensor:
    pixels, _, _ = planted.batch(LABELS, 10_000 + step)
    return pixels


def make_step(training: HeadTraining, step: int, order: Iterator[int] | range = range(NUM_SHARDS)) -> None:
    """One step; the shards are computed in the given order, and added in their own."""
    inputs = training.adapter.normalise(images(step))
    seen = [training.see(inputs[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]) for shard in range(NUM_SHARDS)]
    labels = torch.cat([own.labels for own in seen])
    found = {shard: training.gradient(seen[shard], labels, shard) for shard in order}
    training.advance([found[shard] for shard in range(NUM_SHARDS)])


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(state)).hexdigest()


def energies(training: HeadTraining, num: int = 48) -> tuple[float, float]:
    """The mean part of the masks that lies in the boxes of held-out pictures, and the mean mask."""
    pixels, _, boxes = planted.batch(num, 999)
    inputs = training.adapter.normalise(pixels)
    logits, maps = training.features(inputs)
    with torch.no_grad():
        masks = torch.sigmoid(training.head.masks(training.head.features(maps), logits.argmax(1)[:, None]))
        large = upsampling(training.head.shape.grid, (planted.SIDE, planted.SIDE), masks.device)(masks)[:, 0]
    inside = [planted.energy_inside(own, box) for own, box in zip(large, boxes, strict=True)]
    return sum(inside) / num, float(masks.mean())


def test_the_bits_do_not_depend_on_the_order_in_which_shards_are_computed():
    one, other = of_cnn(), of_cnn()
    for step in range(2):
        make_step(one, step)
        make_step(other, step, reversed(range(NUM_SHARDS)))
    assert digest(one.state()) == digest(other.state())


def test_a_training_goes_on_from_its_state_bit_by_bit():
    whole, first = of_cnn(), of_cnn()
    for step in range(2):
        make_step(whole, step)
        make_step(first, step)
    kept = safetensors.torch.load(safetensors.torch.save(first.state()))
    later = of_cnn()
    later.resume(kept)
    assert later.step == 2
    for step in range(2, 4):
        make_step(whole, step)
        make_step(later, step)
    assert digest(whole.state()) == digest(later.state())


def test_a_state_of_another_head_is_refused():
    training = of_cnn()
    state = training.state()
    state["head.weight"] = state["head.weight"][:2]
    with pytest.raises(ModelError, match="the step is of another head: "):
        training.resume(state)


def test_the_model_stays_as_it_is():
    training = of_cnn()
    before = {name: value.clone() for name, value in training.adapter.module.state_dict().items()}
    make_step(training, 0)
    for name, value in training.adapter.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not training.adapter.module.training
    assert all(own.requires_grad for own in training.adapter.module.parameters())


@pytest.mark.parametrize("broken", ["gradient", "term"])
def test_a_step_that_is_not_finite_changes_nothing(broken):
    training = of_cnn()
    inputs = training.adapter.normalise(images(0))
    seen = [training.see(inputs[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]) for shard in range(NUM_SHARDS)]
    labels = torch.cat([own.labels for own in seen])
    found = [training.gradient(own, labels, shard) for shard, own in enumerate(seen)]
    if broken == "gradient":
        found[3].gradients[0][0] = float("nan")
    else:
        object.__setattr__(found[3], "terms", (float("inf"), 0.0, 0.0))
    before = digest(training.state())
    with pytest.raises(ModelError, match=r"not finite in step 1: take a smaller rate, such as -p lr=0\.001"):
        training.advance(found)
    assert digest(training.state()) == before


def test_biases_do_not_decay():
    training = of_cnn()
    decays = {id(own): group["weight_decay"] for group in training.optimiser.param_groups for own in group["params"]}
    for name, own in training.parameters.items():
        assert decays[id(own)] == (0.0 if name.endswith("bias") else 5e-4), name


def test_the_rate_is_torchs_one_cycle():
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, 50, cycle_momentum=False)
    for step in range(50):
        assert one_cycle(step, 50, 0.1) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9), step
        optimiser.step()
        if step < 49:
            schedule.step()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_short_training_has_a_rate_in_every_step(num_steps):
    assert all(0 < one_cycle(step, num_steps, 0.1) <= 0.1 for step in range(num_steps))


def test_a_head_learns_where_planted_evidence_lies():
    training = of_cnn(50)
    share = (planted.OBJECT_SIDE / planted.SIDE) ** 2
    untrained, _ = energies(training)
    for step in range(50):
        make_step(training, step)
    trained, covered = energies(training)
    assert trained >= 3 * share
    assert trained >= 2 * untrained
    assert 0.02 < covered < 0.5


def test_a_second_network_explains_one_that_is_only_a_function():
    class Function(nn.Module):
        """The explained network behind a function that no tap reaches."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.hidden = [inner.eval()]

        def forward(self, inputs_nchw: Tensor) -> Tensor:
            return self.hidden[0](inputs_nchw)

    auxiliary = planted.trained_cnn()
    explained = planted.adapter_of(Function(planted.trained_cnn().module), "a function")
    training = started(AuxiliaryFeatures(explained, auxiliary), explained)
    own = of_cnn()
    for step in range(2):
        make_step(training, step)
        make_step(own, step)
    # an auxiliary network that is the explained one gives the head of T-TAME on the same taps
    assert [tap.name for tap in training.features.shapes] == [tap.name for tap in own.features.shapes]
    for name, value in training.head.state_dict().items():
        torch.testing.assert_close(value, own.head.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_transformers_taps_are_what_enters_its_last_attentions():
    features = OwnFeatures(planted.trained_vit())
    assert [tap.grid for tap in features.shapes] == [(8, 8)] * 3
    assert len({tap.name for tap in features.shapes}) == 3
    _, maps = features(features_input(planted.trained_vit()))
    for own in maps:
        torch.testing.assert_close(own.mean(1), torch.zeros_like(own.mean(1)), atol=1e-4, rtol=0)


def features_input(adapter: ModelAdapter) -> Tensor:
    return adapter.normalise(images(0)[:2])


def test_a_model_that_is_not_read_by_softmax_is_refused():
    adapter = planted.adapter_of(planted.trained_cnn().module, "read by sigmoid")  # the stored one is shared
    adapter.readout = "sigmoid"
    with pytest.raises(ModelError, match="is read by sigmoid, and a head is trained with the cross entropy of one"):
        started(OwnFeatures(adapter), adapter)
