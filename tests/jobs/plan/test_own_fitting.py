"""Pictures of timm's families are fed as timm does it: a sample of them, and all in the long lane."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.storage.images.decode import fit
from tests.jobs.jobs_of import config_of

FAMILIES = timm.list_modules()


def smallest_of(module: str) -> str:
    """The model of a family of timm with the shortest name that has a small input."""
    names = timm.list_models(module=module)
    known = {name: timm.get_pretrained_cfg(name) for name in names}
    fits = [name for name, one in known.items() if one is not None and one.input_size[0] == 3]
    return min(fits, key=lambda name: (known[name].input_size[1], len(name), name), default="")


@pytest.mark.parametrize(
    "module",
    [pytest.param(one, marks=[] if number % 16 == 3 else pytest.mark.sweep) for number, one in enumerate(FAMILIES)],
)
def test_families_of_timm_are_fed_as_timm_does_it(module):
    name = smallest_of(module)
    if not name:
        pytest.skip("no model of this family has a configuration of three channels")
    if timm.get_pretrained_cfg(name).crop_mode == "border":
        with pytest.raises(ConfigError, match="none that is known here"):
            with_model_file(config_of("/", "/out", model=f"timm:{name}"))
        return
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    text = with_model_file(config_of("/", "/out", model=f"timm:{name}")).resize
    pixels = np.random.default_rng(0).integers(0, 256, (311, 402, 3), dtype=np.uint8)
    wanted = timm.data.create_transform(**data)(Image.fromarray(pixels))
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    levels = 255 * (wanted * std + mean)
    found = torch.from_numpy(fit(pixels, data["input_size"][1:], text).copy()).permute(2, 0, 1)
    assert (found - levels).abs().max() <= 3
