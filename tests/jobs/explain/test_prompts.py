"""Targets that are prompts, through a job on a model that reads texts: its classes are the prompts."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.prompts import Texts
from blocksight.jobs.plan.plan import MODEL_KEY
from blocksight.storage.stores.local import LocalStore
from tests.engine import planted
from tests.jobs.jobs_of import called, fragments_in, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images

READER = "tests.jobs.explain.test_prompts:make_reader"
ENCODED = []
"""The texts that were encoded, in order."""


class Features(nn.Module):
    """The planted CNN without its meaning: a feature with a direction for each class."""

    def __init__(self):
        super().__init__()
        self.inner = planted.trained_cnn().module

    def forward(self, x):
        return functional.pad(self.inner(x), (0, 2), value=3.0)


def make_reader():
    """A model of pictures and texts: `class 3` is the direction of class 3."""
    known = planted.trained_cnn()

    def encode(text):
        ENCODED.append(text)
        own = torch.zeros(planted.NUM_CLASSES + 2)
        own[int(text.rsplit(" ", 1)[1])] = 1.0
        return own

    adapter = ModelAdapter(Features(), name="reader", input_size=known.input_size, mean=known.mean, std=known.std)
    adapter.texts = Texts(encode, scale=10.0, bias=0.0, are_alone=False)
    return adapter


TARGETS = ["text:class 0 - text:class 1", "text:class 1", 'text:"a b-c, class 2|class 3"', "predicted"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A job on prompts."""
    root = tmp_path_factory.mktemp("prompts")
    folder_of_images(root / "in", 3, bad=False)
    run_here(root / "in", root / "out", model=READER, target=TARGETS, explainer="gradcam")
    return root / "out"


def test_rows_name_the_prompts(output):
    rows = rows_in(LocalStore(output))
    words = [row["target"] for row in rows[:4]]
    assert words[:3] == ['text:"class 0"-text:"class 1"', 'text:"class 1"', 'text:"a b-c, class 2|class 3"']
    assert words[3] in ("0", "1", "2")
    assert [row["target_index"] for row in rows[:3]] == [None, 1, 2]
    names = [row["target_name"] for row in rows[:3]]
    assert names == ["class 0 - class 1", "class 1", "a b-c, class 2 (and 1 more)"]
    assert [row["target_formula"] for row in rows[:3]] == ["0-1", "logit(1)", "logit(2)"]


def test_the_embeddings_are_stored_and_not_computed_again(output):
    wanted = fragments_in(LocalStore(output))
    assert b'"embeddings"' in LocalStore(output).read(MODEL_KEY)
    for folder in ("data", "_job/receipts"):
        for file in (output / folder).rglob("*.parquet"):
            file.unlink()
    ENCODED.clear()
    run_here(output.parent / "in", output, model=READER, target=TARGETS, explainer="gradcam")
    assert fragments_in(LocalStore(output)) == wanted
    assert ENCODED == []


def test_the_output_is_read_and_replayed(output, tmp_path):
    shown = ("show", output, "ant/000.png", "--explainers", "layercam", "--model", READER)
    assert called(*shown, "--picture", tmp_path / "p.png")[0] == 0
    assert called("evaluate", output, "--metrics", "insertion", "--runner", "local", "--model", READER)[0] == 0
    assert called("report", output)[0] == 0


def test_a_file_of_prompts_is_its_lines(output, tmp_path):
    (tmp_path / "prompts.txt").write_text("class 0\n\na b, class 2|class 3\n")
    run_here(
        output.parent / "in", tmp_path / "o", model=READER, target=f"text:@{tmp_path}/prompts.txt", explainer="gradcam"
    )
    found = {row["target"] for row in rows_in(LocalStore(tmp_path / "o"))}
    assert found == {'text:"class 0"', 'text:"a b, class 2|class 3"'}


@pytest.mark.parametrize(
    ("model", "target", "reason"),
    [
        (MODEL, "text:a dog", "reads no text"),
        (READER, "logprob(text:class 1)", "a log-probability needs probabilities"),
        (READER, "text:@nowhere.txt", "cannot be read"),
        (READER, "text:class 1,text:class 1 - 5", "5 is no class of the model"),
    ],
)
def test_what_has_no_meaning_is_refused_before_work(model, target, reason, output, tmp_path):
    code, text = called(
        "explain", "--data", output.parent / "in", "--output", tmp_path / "o", "--model", model, "--runner", "local",
        "--explainer", "gradcam", "--target", target,
    )  # fmt: skip
    assert (code, reason in text) == (2, True), text
    assert not list((tmp_path / "o").glob("data/**/*.parquet"))


def test_one_prompt_is_explained_by_its_logit(output, tmp_path):
    run_here(output.parent / "in", tmp_path / "o", model=READER, target="text:class 1", explainer="gradcam")
    scores = {row["score"] for row in rows_in(LocalStore(tmp_path / "o"))}
    assert len(scores) == 3  # a softmax of one would be 1 for all


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_prompts_find_their_objects(order):
    pixels, classes, boxes = planted.pairs(4, 9)
    adapter = make_reader()
    from blocksight.engine.catalog.parameters import NoParameters
    from blocksight.engine.catalog.target_expressions import parse_formula
    from blocksight.engine.explainers import make_explainer

    for picture, own, places in zip(pixels, classes.tolist(), boxes, strict=True):
        prompted = adapter.with_prompts([[f"class {own[order[0]]}"], [f"class {own[order[1]]}"]])
        explainer = make_explainer("gradcam", prompted, NoParameters())
        ((one,),) = explainer.explain(prompted.normalise(picture[None]), prompted.target_of([[parse_formula("0-1")]]))
        inside = [planted.energy_inside(torch.from_numpy(one.saliency_hw), box) for box in places]
        assert inside[order[0]] > inside[order[1]]
