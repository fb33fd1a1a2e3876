"""Errors of the device at each place where a model is called: no record is blamed, and a sentence says what to do."""

import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from blocksight.engine.errors import ModelError
from blocksight.engine.judging.preflight import try_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import device_trouble, told_by_device
from blocksight.engine.model.examination import examine
from blocksight.engine.scoring import forward, setting_choice
from blocksight.jobs.bench import bank
from blocksight.jobs.evaluate.step import EvaluateStep
from blocksight.jobs.explain import first_pass, step
from blocksight.jobs.explain.preflight import in_a_sentence
from blocksight.jobs.ledger.dead_letters import read_letters
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.records import RecordFacts, UnfinishedError, UnitInput
from blocksight.jobs.worker import isolation
from blocksight.jobs.worker.error_classes import UnfitWorkerError
from blocksight.jobs.worker.isolation import Isolated, ProcessDiedError
from blocksight.storage.stores.local import LocalStore
from tests.faults.devices import HOST_MEMORY, LOST, MEMORY, UNFIT, one_of_each
from tests.jobs.jobs_of import blocksight, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images, make
from tests.jobs.worker.test_commit import UNIT

ERRORS = one_of_each()
OF_THE_DEVICE = [MEMORY, UNFIT, LOST]
LOUD = [MEMORY, UNFIT, LOST, HOST_MEMORY]
ORDINARY = ValueError("an ordinary error")


@pytest.fixture
def data(tmp_path):
    return folder_of_images(tmp_path / "in", 3, bad=False)


def raising(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


def no_record_is_blamed(folder):
    store = LocalStore(folder)
    assert [row["error"] for row in rows_in(store) if row["error"] and "ordinary" not in row["error"]] == []
    assert read_letters(store, load_plan(store).units) == {}


# ---------------------------------------------------------------- explain


@pytest.mark.parametrize(
    ("call", "trouble"), [*(("_explain", one) for one in LOUD), *(("_outputs", one) for one in OF_THE_DEVICE)]
)
def test_no_record_is_rejected_for_the_device(data, tmp_path, monkeypatch, call, trouble):
    monkeypatch.setattr(step.ExplainStep, call, raising(ERRORS[trouble]))
    monkeypatch.setattr(step, "Isolated", InThisProcess)
    if trouble in (MEMORY, HOST_MEMORY):
        outcome = run_here(data, tmp_path / "out")
        assert outcome.ran.failures[0].error == told_by_device(ERRORS[trouble])
        assert outcome.job_state.open_units
    else:
        with pytest.raises(UnfitWorkerError, match="device"):
            run_here(data, tmp_path / "out")
    no_record_is_blamed(tmp_path / "out")


class InThisProcess(Isolated):
    """Calls the function here; the child process of a test could not be given errors."""

    def __enter__(self):
        self.function = self._make()
        return self

    def __call__(self, item):
        return self.function(item)


@pytest.mark.parametrize("trouble", OF_THE_DEVICE)
def test_a_device_that_fails_after_an_ordinary_error_blames_nobody_else(data, tmp_path, monkeypatch, trouble):
    """The first records show the ordinary error of one of them; then the device goes."""
    real, calls = step.ExplainStep._explain_all, []

    def explain(self, unit_input):
        calls.append(len(unit_input.records))
        if len(calls) <= 2:  # the unit as a whole, and its first record alone
            raise ValueError("an ordinary error of one record")
        if len(calls) >= 4:
            raise ERRORS[trouble]
        return real(self, unit_input)

    monkeypatch.setattr(step.ExplainStep, "_explain_all", explain)
    if trouble is MEMORY:
        run_here(data, tmp_path / "out")
    else:
        with pytest.raises((UnfitWorkerError, UnfinishedError), match="device"):
            run_here(data, tmp_path / "out")
    assert len(calls) >= 4
    no_record_is_blamed(tmp_path / "out")


def test_a_device_that_is_lost_without_a_word_is_found_out(monkeypatch):
    monkeypatch.setattr(torch, "ones", raising(ERRORS[LOST]))
    on_meta = make().to("meta")
    with pytest.raises(torch.AcceleratorError):
        step.try_device(on_meta, ORDINARY)
    step.try_device(on_meta, ERRORS[MEMORY])  # it has spoken
    step.try_device(make(), ORDINARY)


def no_device(adapter, error):
    """Instead of `try_device`, on a device that is lost without a word."""
    assert error is ORDINARY
    raise ERRORS[LOST]


def test_no_record_is_blamed_before_the_device_is_tried(monkeypatch):
    own = step.ExplainStep.__new__(step.ExplainStep)
    own.has_forward_setting, own._explain_all, own.adapter = True, raising(ORDINARY), None
    monkeypatch.setattr(step, "try_device", no_device)
    with pytest.raises(torch.AcceleratorError):
        own._explain_all_that_fits(alone())


def test_no_image_of_the_first_pass_is_left_out_before_the_device_is_tried(monkeypatch):
    own = step.ExplainStep.__new__(step.ExplainStep)
    own._with_labels, own._inputs_and_targets, own.adapter = list, raising(ORDINARY), None
    monkeypatch.setattr(step, "try_device", no_device)
    with pytest.raises(torch.AcceleratorError):
        own.teach(None, [1], np.zeros((1, 4, 4, 3), np.uint8))


def test_no_map_goes_without_values_before_the_device_is_tried(monkeypatch):
    own = EvaluateStep.__new__(EvaluateStep)
    own._measured_rows, own.adapter = raising(ORDINARY), None
    monkeypatch.setattr("blocksight.jobs.evaluate.step.try_device", no_device)
    with pytest.raises(torch.AcceleratorError):
        own._chunk_rows([[{}]], np.zeros((1, 4, 4, 3), np.uint8))


# ---------------------------------------------------------------- a record that kills, and a device that dies


def alone():
    facts = RecordFacts("k", "s", 0, None)
    return UnitInput(UNIT, (facts,), np.zeros((1, 4, 4, 3), np.uint8))


def one_by_one(explain):
    own = step.ExplainStep.__new__(step.ExplainStep)
    own.setting = "none"
    own._rejected_row = lambda _, record: {"code": record.reject_code}
    return step.ExplainStep._explain_one_by_one(own, alone(), explain).rows


class Dying(Isolated):
    """A child process that ends at the record, and if it `kills_all` also at a picture of noise."""

    def __init__(self, error, *, kills_all):
        self.error, self.kills_all = error, kills_all

    def __call__(self, item):
        if self.kills_all or not item.pixels.any():
            raise self.error
        return SimpleNamespace(rows=[])


DEATHS = [ProcessDiedError("2 processes that worked on it died: Aborted"), ERRORS[LOST], ERRORS[HOST_MEMORY]]


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_a_record_is_blamed_for_a_death_if_another_picture_lives(monkeypatch, error):
    monkeypatch.setattr("blocksight.jobs.worker.error_classes.free_bytes", lambda: 1 << 40)
    (row,) = one_by_one(Dying(error, kills_all=False))
    assert row["code"] == ("model_failed" if error is ERRORS[HOST_MEMORY] else "process_died")


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_a_record_is_not_blamed_for_a_death_that_any_picture_dies(monkeypatch, error):
    monkeypatch.setattr("blocksight.jobs.worker.error_classes.free_bytes", lambda: 1 << 40)
    with pytest.raises(MemoryError if error is ERRORS[HOST_MEMORY] else UnfitWorkerError):
        one_by_one(Dying(error, kills_all=True))


def test_a_child_process_that_lost_its_device_is_replaced(monkeypatch):
    started = []
    monkeypatch.setattr(isolation, "_start", lambda: started.append(1) or (Ended(), SimpleNamespace(close=lambda: 0)))
    monkeypatch.setattr(isolation, "_asked", lambda _, item: (item is dict, {dict: None}.get(item, item)))
    apart = Isolated(dict)
    with pytest.raises(ValueError, match="odd"):
        apart(ValueError("odd"))
    with pytest.raises(RuntimeError, match="memory is short"):
        apart(RuntimeError(told_by_device(ERRORS[MEMORY])))
    assert len(started) == 1
    with pytest.raises(torch.AcceleratorError, match="illegal memory"):
        apart(ERRORS[LOST])
    assert len(started) == 2
    assert apart._child is None


class Ended:
    """A process that has ended."""

    def wait(self, *_):
        return 0

    def kill(self):
        pass


def test_a_child_process_says_what_the_device_said_behind_its_error():
    error = ModelError("the model fails")
    error.__cause__ = ERRORS[MEMORY]
    sent = pickle.dumps(isolation._portable(error))  # without the errors behind it
    assert device_trouble(pickle.loads(sent)) is MEMORY
    assert isolation._portable(ERRORS[LOST]) is ERRORS[LOST]
    assert isinstance(isolation._portable(ModelError("x")), ModelError)


# ---------------------------------------------------------------- memory


def test_memory_that_is_short_where_the_forward_pass_is_made_halves_the_batch(data, tmp_path, monkeypatch):
    real, made = step.stored_forward, []

    def make_it(output, adapter, most_inputs):
        made.append(most_inputs)
        if most_inputs is None or most_inputs > 1:
            raise ERRORS[MEMORY]
        return real(output, adapter, most_inputs)

    monkeypatch.setattr(step, "stored_forward", make_it)
    assert run_here(data, tmp_path / "out").manifest is not None
    assert made == [None, 2, 1]
    assert {row["status"] for row in rows_in(LocalStore(tmp_path / "out"))} == {"ok"}


def test_a_forward_pass_for_which_there_is_never_memory_ends_the_job(data, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "stored_forward", raising(ERRORS[MEMORY]))
    with pytest.raises(UnfitWorkerError, match="smaller --batch-size"):
        run_here(data, tmp_path / "out")
    no_record_is_blamed(tmp_path / "out")


@pytest.mark.parametrize("trouble", [MEMORY, HOST_MEMORY])
def test_a_lack_of_memory_is_told_in_one_way_where_a_forward_pass_is_made(monkeypatch, trouble):
    monkeypatch.setattr(ModelAdapter, "logits", raising(ERRORS[trouble]))
    with pytest.raises(torch.OutOfMemoryError):
        forward.make_forward(make(), setting_choice.eager_setting("cpu"))


# ---------------------------------------------------------------- before the first unit


@pytest.mark.parametrize("trouble", LOUD)
@pytest.mark.parametrize("call", ["num_classes", "network", "examine", "try"])
def test_before_the_first_unit_an_error_of_the_device_is_not_the_models(monkeypatch, call, trouble):
    adapter, error = make(), ERRORS[trouble]
    method = SimpleNamespace(innermost=SimpleNamespace(entry=SimpleNamespace(needs=())))
    explainer = SimpleNamespace(explain=raising(error), adapter=adapter)
    image, classes = torch.zeros(2, 3, 32, 32), torch.zeros(1, 1, dtype=torch.int64)
    calls = {
        "num_classes": lambda: adapter.num_classes,
        "network": lambda: adapter.network,
        "examine": lambda: examine(adapter, image),
        "try": lambda: try_explainer(explainer, method, (), image[:1], adapter.target(classes)),
    }
    monkeypatch.setattr(type(adapter.module), "forward", raising(error))
    with pytest.raises(type(error)), in_a_sentence("m"):
        calls[call]()


@pytest.mark.parametrize("trouble", OF_THE_DEVICE)
@pytest.mark.parametrize("command", ["bank", "bench", "explain"])
def test_every_command_says_an_error_of_the_device_in_a_sentence(data, tmp_path, monkeypatch, command, trouble):
    monkeypatch.setattr(ModelAdapter, "logits", raising(ERRORS[trouble]))
    where = ["--output", tmp_path / ("bank.safetensors" if command == "bank" else "out")]
    done = blocksight(command, "--data", data, "--model", MODEL, *where)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {told_by_device(ERRORS[trouble])}"


# ---------------------------------------------------------------- first pass, evaluate


@pytest.mark.parametrize("trouble", OF_THE_DEVICE)
def test_no_image_of_the_first_pass_is_left_out_for_the_device(monkeypatch, trouble):
    own = step.ExplainStep.__new__(step.ExplainStep)
    own._with_labels = lambda records: records
    own._can_halve, own.adapter = (lambda: False), None
    own._inputs_and_targets = raising(ERRORS[trouble])
    with pytest.raises(type(ERRORS[trouble])):
        own.teach(None, [1, 2], np.zeros((2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize("error", DEATHS[:2], ids=repr)
@pytest.mark.parametrize("kills_all", [False, True])
def test_an_image_that_kills_in_the_first_pass_is_left_out_if_another_picture_lives(monkeypatch, error, kills_all):
    monkeypatch.setattr(first_pass, "Isolated", lambda _: nullcontext(Dying(error, kills_all=kills_all)))
    killing, harmless = ((RecordFacts("k", "s", 0, None), np.full((4, 4, 3), grey, np.uint8)) for grey in (0, 9))
    kept = first_pass._harmless_images([killing, harmless], None, [UNIT], None)
    if kills_all:
        with pytest.raises(UnfitWorkerError):
            list(kept)
    else:
        assert list(kept) == [harmless]


def test_the_first_pass_goes_on_with_fewer_images_at_once():
    own = step.ExplainStep.__new__(step.ExplainStep)
    own._with_labels = lambda records: records
    sizes = [4]
    own._can_halve = lambda: sizes[-1] > 1
    own._halve = lambda: sizes.append(sizes[-1] // 2)

    def inputs(records, pixels):
        if sizes[-1] > 1:
            raise ERRORS[MEMORY]
        return "inputs", None, "targets"

    own._inputs_and_targets = inputs
    assert own._learnable([1], np.zeros((1, 4, 4, 3), np.uint8)) == ("inputs", "targets")
    assert sizes == [4, 2, 1]


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    root = tmp_path_factory.mktemp("explained")
    run_here(folder_of_images(root / "in", 3, bad=False), root / "out", explainer="gradcam")
    return root / "out"


def evaluate(output):
    return blocksight("evaluate", output, "--model", MODEL, "--metrics", "insertion", "--runner", "local")


@pytest.mark.parametrize("trouble", LOUD)
def test_no_metric_goes_without_a_value_for_the_device(explained, monkeypatch, trouble):
    monkeypatch.setattr(EvaluateStep, "_maps", raising(ERRORS[trouble]))
    done = evaluate(explained)
    assert not list((explained / "_job").glob("evaluations/*/values/*"))
    told = told_by_device(ERRORS[trouble])
    if trouble in (MEMORY, HOST_MEMORY):
        assert done.returncode == 4
    else:
        assert done.returncode == 2
    assert told[:40] in (done.stdout + done.stderr).replace("\n", " ")


def test_metrics_are_measured_with_fewer_masks_at_once_if_memory_is_short(explained, monkeypatch):
    real, sizes = EvaluateStep._maps, []

    def maps(self, records, pixels):
        sizes.append(self.setting.batch_size)
        if sizes[-1] > 1:
            raise ERRORS[MEMORY]
        return real(self, records, pixels)

    monkeypatch.setattr(EvaluateStep, "_maps", maps)
    assert evaluate(explained).returncode == 0
    assert sizes[:3] == [4, 2, 1]


# ---------------------------------------------------------------- bank


def test_a_bank_is_made_with_fewer_images_at_once_if_memory_is_short(data, tmp_path, monkeypatch):
    real, sizes = bank._Features._pass, []

    def make(self, some):
        sizes.append(self.size)
        if self.size > 1:
            raise ERRORS[MEMORY]
        return real(self, some)

    for name in ("plain", "short"):
        done = blocksight("bank", "--data", data, "--model", MODEL, "--output", tmp_path / f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
        monkeypatch.setattr(bank._Features, "_pass", make)
    assert sizes == [4, 2, 1, 1, 1]
    plain, short = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "short"))
    assert plain.keys() == short.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(short[name], tensor)
