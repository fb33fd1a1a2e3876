"""A small CLIP that learned planted pictures by their captions, as a folder of the library transformers.

A caption names what is planted, in one of several phrases: one object, two, or none. Which picture belongs to which
caption is all that training says. `python -m tests.engine.planted_clip` trains it, and stores its weights.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.prompts import Texts
from blocksight.engine.model.threads import one_thread
from tests.engine import planted

PHRASES = ("{}", "a picture of {}", "{} on grey noise")
NOTHING = "nothing"
SPECIAL = ("[pad]", "[start]", "[end]")
_NAMES = ("horizontal", "vertical", "stripes", "checkerboard", "disc", "cross")
WORDS = (*SPECIAL, "a", "picture", "of", "on", "grey", "noise", "and", "nothing", *_NAMES)
"""The whole vocabulary, in order of the tokens' numbers."""
MAX_WORDS = 14
WIDTH = 64
LESSON = planted.Lesson(single=24, double=16, empty=8)


def caption(classes: Sequence[int], rng: random.Random) -> str:
    """What a picture of these objects shows, in any phrase and order."""
    names = [planted.CLASS_NAMES[one] for one in rng.sample(list(classes), len(classes))] or [NOTHING]
    return rng.choice(PHRASES).format(" and ".join(names))


def prompt(name: str) -> str:
    """The text that stands for a class."""
    return f"a picture of {name}"


def tokens(texts: Sequence[str]) -> dict[str, Tensor]:
    """The numbers of the words [N, W] between start and end, and where there are any."""
    rows = [[1, *(WORDS.index(word) for word in text.split()), 2] for text in texts]
    width = max(map(len, rows))
    numbers = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": numbers, "attention_mask": (numbers > 0).long()}


def small_clip() -> nn.Module:
    """CLIP of the library transformers: four layers over 8 x 8 patches, two over words; 0.2 million weights."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": MAX_WORDS, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "image_size": planted.SIDE, "patch_size": 8, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4, "num_attention_heads": 4,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


class Tower(nn.Module):
    """The feature [N, D] of pictures."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        return self.projection(self.vision(pixel_values=inputs_nchw).pooler_output)


def words_feature(clip: Any, texts: Sequence[str]) -> Tensor:
    """The features [N, D] of texts."""
    return clip.text_projection(clip.text_model(**tokens(texts)).pooler_output)


def train_clip(*, num_steps: int = 300, peak_rate: float = 2e-3, seed: int = 0) -> nn.Module:
    """The network after so many steps on fresh pictures and captions; on one thread the same seed gives the same bits.

    A picture belongs to every caption of its batch that says the same.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        clip, rng, words = small_clip().train(), planted.generator(seed), random.Random(seed)
        tower = planted.adapter_of(Tower(clip), "tower")
        optimiser = torch.optim.AdamW(clip.parameters(), lr=peak_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, num_steps, pct_start=0.2)
        for _ in range(num_steps):
            pixels, shown = _lesson(rng)
            optimiser.zero_grad()
            seen = functional.normalize(tower.logits(tower.normalise(pixels)), dim=1)
            said = functional.normalize(words_feature(clip, [caption(own, words) for own in shown]), dim=1)
            _loss(clip.logit_scale.exp() * seen @ said.T, shown).backward()
            nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return clip.eval()


def _lesson(rng: torch.Generator) -> tuple[Tensor, list[frozenset[int]]]:
    """Pictures of one object, of two, and of none, with what they show."""
    single, one, _ = planted.draw_one(LESSON.single, rng)
    double, two, _ = planted.draw_two(LESSON.double, rng)
    count = LESSON.empty
    empty = planted.draw(torch.empty(count, 0, dtype=torch.long), torch.empty(count, 0, 2, dtype=torch.long), rng)
    shown = [*([one] for one in one.tolist()), *two.tolist(), *([] for _ in range(count))]
    return torch.cat([single, double, empty]), [frozenset(own) for own in shown]


def _loss(similarities: Tensor, shown: Sequence[frozenset[int]]) -> Tensor:
    alike = torch.tensor([[float(one == other) for other in shown] for one in shown])
    wanted = alike / alike.sum(1, keepdim=True)
    return (functional.cross_entropy(similarities, wanted) + functional.cross_entropy(similarities.T, wanted)) / 2


def adapter_with_texts(clip: Any) -> ModelAdapter:
    """The adapter of a trained network's pictures, which reads texts: `with_prompts` makes a classifier of it."""
    adapter = planted.adapter_of(Tower(clip), "planted CLIP")
    adapter.class_names = None
    scale = float(clip.logit_scale.detach().exp())

    def encode(text: str) -> Tensor:
        with torch.no_grad():
            return words_feature(clip, [text])[0]

    adapter.texts = Texts(encode, scale=scale, bias=0.0, are_alone=False)
    return adapter


def classifier(clip: nn.Module) -> ModelAdapter:
    """A trained network with a prompt for each class."""
    return adapter_with_texts(clip).with_prompts([[prompt(name)] for name in planted.CLASS_NAMES])


WEIGHTS = Path(__file__).with_name("planted-clip.safetensors")


@cache
def stored_clip() -> nn.Module:
    """The trained network, read once per process."""
    clip = small_clip()
    clip.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return clip.eval()


def write_folder(folder: Path) -> Path:
    """The trained network as `save_pretrained` leaves it, with its tokenizer and its preprocessing."""
    import tokenizers
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[pad]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = [(word, WORDS.index(word)) for word in SPECIAL[1:]]
    words.post_processor = tokenizers.processors.TemplateProcessing("[start] $A [end]", special_tokens=ends)
    named = {"pad_token": "[pad]", "bos_token": "[start]", "eos_token": "[end]", "unk_token": "[pad]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=MAX_WORDS, **named).save_pretrained(folder)
    stored_clip().save_pretrained(folder)
    CLIPImageProcessor(
        size={"height": planted.SIDE, "width": planted.SIDE}, do_center_crop=False, image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def main() -> None:
    """Trains the network and stores its weights."""
    state = {name: value.contiguous() for name, value in train_clip().state_dict().items()}
    safetensors.torch.save_file(state, WEIGHTS)
    WEIGHTS.chmod(0o644)


if __name__ == "__main__":
    main()
