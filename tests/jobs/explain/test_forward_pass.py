"""The forward setting of a job: planned once before the first unit, by no clock, and used by all workers."""

import json
import random
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import Sizing
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.errors import ModelError
from blocksight.engine.scoring import setting_choice
from blocksight.engine.scoring.forward import BufferedForward
from blocksight.engine.scoring.setting_choice import MeasuredSetting
from blocksight.jobs.cli import job_tables, metric_tables
from blocksight.jobs.evaluate.compare import compare, rows_of_table
from blocksight.jobs.explain import forward_pass, step
from blocksight.jobs.explain.forward_choice import choose_here
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.forward_setting import FORWARD_KEY, PlannedForward, planned_forward, setting_difference
from blocksight.jobs.plan.plan import DriftError
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.report.facts import run_facts
from blocksight.jobs.run import job, pipeline
from blocksight.jobs.run.job import run_job
from blocksight.jobs.run.local import run_units
from blocksight.jobs.versus.run import write_difference
from blocksight.jobs.worker.error_classes import UnfitWorkerError
from blocksight.jobs.worker.rows import existing_output
from blocksight.storage.stores.opening import open_store
from tests.jobs.jobs_of import config_of, fragments_in, receipts_in, rows_in, run_here
from tests.jobs.tiny import folder_of_images, red

BFLOAT = ForwardSetting("eager", "bfloat16")


def store_of(output):
    return open_store(str(output), None)


def receipts(output):
    store = store_of(output)
    return receipts_in(store)


def plan_setting(output, setting):
    """Plans a forward setting before the job does."""
    store_of(output).create(FORWARD_KEY, json.dumps({"setting": asdict(setting)}).encode())


def run_with(data, output, console=None, batch_size=None, tune=False, **options):
    execution = Execution(runner="local", batch_size=batch_size, tune=tune)
    return run_job(config_of(data, output, **options), execution, console or Console(quiet=True))


@pytest.fixture
def data(tmp_path):
    return folder_of_images(tmp_path / "data", count=4, bad=False)


# ---------------------------------------------------------------- the same bytes on the same machine


@pytest.mark.chooses
def test_two_fresh_outputs_are_the_same_whatever_the_clock_says(tmp_path, data, monkeypatch):
    """Guards against settings that depend on time or on the first images."""
    monkeypatch.setattr(setting_choice, "measured_seconds", lambda *_, **__: random.uniform(1e-6, 10))
    outputs = [tmp_path / name for name in ("one", "two")]
    for output in outputs:
        assert run_here(data, output, preset="fast").manifest is not None
    planned = [store_of(output).read(FORWARD_KEY) for output in outputs]
    assert planned[0] == planned[1]
    assert json.loads(planned[0])["setting"] == asdict(ForwardSetting("openvino", "float32", 8))
    assert fragments_in(store_of(outputs[0])) == fragments_in(store_of(outputs[1]))


@pytest.mark.chooses
def test_the_setting_depends_on_no_image_and_on_no_number_of_them(tmp_path, data):
    (tmp_path / "other" / "bee").mkdir(parents=True)
    (tmp_path / "other" / "bee" / "red.png").write_bytes(red())
    run_here(data, tmp_path / "one")
    run_here(tmp_path / "other", tmp_path / "two", explainer="gradcam")  # so that methods can be compared
    one, two = (store_of(tmp_path / name).read(FORWARD_KEY) for name in ("one", "two"))
    assert one == two


def test_the_setting_is_chosen_on_one_thread_as_the_workers_have(tmp_path, data, monkeypatch):
    """Eager scores on one thread and on two differ in their last bits."""
    before, seen = torch.get_num_threads(), []

    def choose(adapter, request):
        seen.append(torch.get_num_threads())
        return real(adapter, request)

    real = forward_pass.choose
    monkeypatch.setattr(forward_pass, "choose", choose)
    torch.set_num_threads(2)
    try:
        run_here(data, tmp_path / "maps")
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_a_model_is_loaded_with_ieee_float32_whatever_its_factory_allows(tmp_path):
    torch.set_float32_matmul_precision("medium")
    step.load(config_of(tmp_path, tmp_path / "out"), None, "cpu", str(tmp_path))
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


# ---------------------------------------------------------------- the plan


def test_the_setting_is_in_the_plan_before_the_first_unit(tmp_path, data, monkeypatch):
    seen = []

    def explained(self, unit_input, *, careful=False):
        seen.append(planned_forward(store_of(tmp_path / "maps")))
        return real(self, unit_input, careful=careful)

    real = step.ExplainStep.__call__
    monkeypatch.setattr(step.ExplainStep, "__call__", explained)
    run_here(data, tmp_path / "maps")
    assert seen[0] is not None
    assert seen[0].setting == ForwardSetting()
    assert seen[0].chosen == "rule"
    assert {one["forward"] for one in receipts(tmp_path / "maps")} == {str(ForwardSetting())}


def test_the_planned_setting_is_used(tmp_path, data, monkeypatch):
    kept = ForwardSetting(batch_size=5)
    plan_setting(tmp_path / "maps", kept)
    monkeypatch.setattr(forward_pass, "choose", lambda *_: pytest.fail("nothing is to be chosen"))
    run_here(data, tmp_path / "maps")
    assert {one["forward"] for one in receipts(tmp_path / "maps")} == {str(kept)}


def test_another_batch_size_than_the_plans_is_refused_with_both(tmp_path, data):
    run_with(data, tmp_path / "maps", batch_size=3, limit=3)
    store = store_of(tmp_path / "maps")
    for info in list(store.list("data/")):
        store.delete(info.key)
    for info in [*store.list("_job/receipts/"), *store.list("_job/final/")]:
        store.delete(info.key)
    with pytest.raises(DriftError, match=r"batch_size: 3 in the output, 8 asked for"):
        run_with(data, tmp_path / "maps", batch_size=8, limit=3)
    assert run_with(data, tmp_path / "maps", limit=3).forward.setting.batch_size == 3


def test_another_precision_than_the_plans_is_refused_with_both(tmp_path, data):
    run_here(data, tmp_path / "maps")
    with pytest.raises(DriftError, match=r'precision: "auto" in the output, "bfloat16" asked for'):
        run_here(data, tmp_path / "maps", precision="bfloat16")


def test_a_damaged_setting_is_one_sentence(tmp_path):
    settings = (b"3", b'{"precision": "float8"}', b'{"backend": "x"}', b'{"batch_size": 0}', b'{"batch_size": 99999}')
    whole = b'{"backend": "eager", "precision": "float32", "batch_size": 4}'
    for body in (b"{", b"[]", b"{}", b'{"setting": ' + whole, *(b'{"setting": ' + one + b"}" for one in settings)):
        store = store_of(tmp_path / body.hex())
        store.create(FORWARD_KEY, body)
        with pytest.raises(UnreconciledError, match=r"forward\.json is damaged"):
            planned_forward(store)


def test_the_setting_of_an_older_output_is_read(tmp_path):
    store = store_of(tmp_path)
    setting = {"backend": "compiled", "precision": "bfloat16", "batch_size": 8}
    older = {"setting": setting, "probe": [{"forwards_per_second": 3.0}]}
    store.create(FORWARD_KEY, json.dumps(older).encode())
    planned = planned_forward(store)
    assert planned is not None
    assert planned.setting == ForwardSetting("compiled", "bfloat16", 8)
    assert (planned.chosen, planned.score_error) == ("timing", None)


@pytest.mark.parametrize("setting", [ForwardSetting("captured", "float16", 256), ForwardSetting(is_autocast=True)])
def test_every_setting_is_stored_and_read_as_it_is(tmp_path, setting):
    forward_pass.write_forward(store_of(tmp_path), PlannedForward(setting))
    planned = planned_forward(store_of(tmp_path))
    assert planned is not None
    assert planned.setting == setting


def test_a_machine_that_cannot_run_the_setting_ends_the_job_at_its_first_unit(tmp_path, data):
    plan_setting(tmp_path / "maps", ForwardSetting("graphed"))
    with pytest.raises(UnfitWorkerError, match="run it on a machine like the first one"):
        run_here(data, tmp_path / "maps")
    assert not rows_in(store_of(tmp_path / "maps"))
    assert list(store_of(tmp_path / "maps").list("_job/dead/")) == []


# ---------------------------------------------------------------- what the user says


def test_a_lower_precision_needs_the_users_option_and_the_plan_holds_its_error(tmp_path, data):
    console = Console(record=True, width=200)
    run_with(data, tmp_path / "maps", console, precision="bfloat16")
    planned = planned_forward(store_of(tmp_path / "maps"))
    assert planned is not None
    assert planned.setting == BFLOAT
    assert planned.score_error is not None
    assert 0 < planned.score_error < 0.25
    assert f"score error {planned.score_error:.2g}" in console.export_text()


def test_a_lower_precision_with_a_large_error_is_warned_of():
    far = PlannedForward(setting=BFLOAT, chosen="rule", score_error=0.046)
    assert "bfloat16 changes this model's scores by 4.6%" in (forward_pass.precision_warning(far) or "")
    assert forward_pass.precision_warning(replace(far, score_error=0.01)) is None
    assert forward_pass.precision_warning(PlannedForward(setting=ForwardSetting(), score_error=1e-5)) is None


def test_a_precision_of_no_use_leaves_no_output_behind(tmp_path, data, monkeypatch):
    monkeypatch.setattr(setting_choice, "MAX_REQUESTED_ERROR", 1e-9)
    with pytest.raises(ModelError, match="does not work in bfloat16"):
        run_here(data, tmp_path / "maps", precision="bfloat16")
    run_here(data, tmp_path / "maps")  # the same place, without it


def test_tune_lets_a_timing_choose_and_a_rerun_keeps_it(tmp_path, data, monkeypatch):
    fast = ForwardSetting(batch_size=7)
    measured = (None, [MeasuredSetting(fast, 0.0, 9.0)])
    monkeypatch.setattr(forward_pass, "choose", lambda _, request: measured if request.is_timed else None)
    run_with(data, tmp_path / "maps", tune=True)
    planned = planned_forward(store_of(tmp_path / "maps"))
    assert planned is not None
    assert (planned.setting, planned.chosen) == (fast, "timing")
    assert planned.probe[0]["forwards_per_second"] == 9.0
    assert run_with(data, tmp_path / "maps").manifest is not None


# ---------------------------------------------------------------- no mixture without a word


def test_maps_of_two_precisions_share_no_column_and_the_table_says_so(tmp_path, data):
    for name, options in (("exact", {}), ("rough", {"precision": "bfloat16"})):
        run_here(data, tmp_path / name, **options)
    outputs = [existing_output(str(tmp_path / name)) for name in ("exact", "rough")]
    table = compare(outputs)
    assert {len([c for c in table.cells if c.column == column and c.estimate.count]) for column in table.columns} == {1}
    (note,) = table.notes
    assert "exact: eager float32" in note
    assert "rough: eager bfloat16" in note
    assert {row["forward"] for row in rows_of_table(table)} == {"eager float32", "eager bfloat16"}
    console = Console(record=True, width=200)
    console.print(metric_tables.comparison_table(table, 200))
    assert "forward passes were run differently" in console.export_text()
    assert not compare(outputs[:1]).notes
    made = write_difference(*outputs, store_of(tmp_path / "difference"), None, Console(quiet=True))
    assert made.summary["note"] == note
    assert (made.summary["a"]["forward"], made.summary["b"]["forward"]) == ("eager float32", "eager bfloat16")
    console.print(metric_tables.difference_table(made.summary, "place"))
    assert console.export_text().count("forward passes were run differently") == 1
    rows = [row for name in ("exact", "rough") for row in rows_in(store_of(tmp_path / name))]
    assert len({row["metrics"]["protocol"] for row in rows}) == 2


def test_the_table_separates_outputs_with_and_without_a_recorded_setting():
    known = PlannedForward(setting=ForwardSetting())
    assert setting_difference({"a": known, "b": PlannedForward(setting=ForwardSetting(batch_size=9))}) is None
    assert setting_difference({"a": None, "b": None}) is None
    assert "b: not recorded" in (setting_difference({"a": known, "b": None}) or "")


def test_status_and_report_say_how_masks_were_scored(tmp_path, data):
    outcome = run_here(data, tmp_path / "maps", precision="bfloat16")
    console = Console(record=True, width=200)
    console.print(job_tables.job_state_table("maps", outcome.job_state, outcome.forward))
    assert "scored by eager bfloat16, 4 per pass (chosen by rule, score error" in console.export_text()
    found = {fact.name: fact for fact in run_facts(outcome.job_state.plan, {}, {}, outcome.forward)}
    assert found["masks scored by"].value == "eager bfloat16, 4 per pass"
    assert "median score error 0.0" in found["masks scored by"].note


# ---------------------------------------------------------------- on GPUs one worker chooses for all


GPUS = Sizing(8, 1.0, 1.0, 0.5, 1)
"""Of a Ray session."""


def run_on_gpus(data, output, monkeypatch, choose, **execution):
    """A job that believes in a Ray session with GPUs, and whose units are explained in this process.

    Its console's text.
    """
    console = Console(record=True, width=300)
    monkeypatch.setattr(job, "session_of", lambda *_: nullcontext(GPUS))
    monkeypatch.setattr(job, "check_gpu", lambda _: None)
    monkeypatch.setattr(job, "PROBE_FROM_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "choose_on_worker", choose)
    in_process = replace(GPUS, gpus_per_actor=0.0)
    real = job.context_of
    monkeypatch.setattr(job, "context_of", lambda c, p, f, _, *more: real(c, p, f, in_process, *more))
    monkeypatch.setattr(
        pipeline, "run_units", lambda units, context, state, _, stop, *__: run_units(units, context, state, stop)
    )
    job.run_job(config_of(data, output), Execution(**execution), console)
    return console.export_text()


def test_one_gpu_chooses_before_the_first_unit_and_its_rate_is_stored(tmp_path, data, monkeypatch):
    asked = []

    def choose(context, state, request, sizing):
        assert not list(store_of(tmp_path / "maps").list())
        asked.append((request.is_timed, sizing))
        return PlannedForward(
            ForwardSetting(batch_size=3), forwards_per_second=4e4, hardware="H", compute_capability="9.0"
        )

    said = run_on_gpus(data, tmp_path / "maps", monkeypatch, choose)
    assert "3 per pass (chosen by timing; 40,000 forwards/s on H, compute capability 9.0)" in said
    assert asked == [(True, GPUS)]
    planned = planned_forward(store_of(tmp_path / "maps"))
    assert planned is not None
    assert (planned.forwards_per_second, planned.hardware, planned.compute_capability) == (4e4, "H", "9.0")
    assert {receipt["forward"] for receipt in receipts(tmp_path / "maps")} == {"eager float32, 3 per pass"}
    for fragment in (tmp_path / "maps/data").rglob("*.parquet"):
        fragment.unlink()
    run_on_gpus(data, tmp_path / "maps", monkeypatch, choose)
    assert len(asked) == 1  # a resumed job keeps it


def test_a_gpu_that_fails_over_a_timing_chooses_by_rule(tmp_path, data, monkeypatch):
    asked = []

    def choose(context, state, request, sizing):
        asked.append(request.is_timed)
        if request.is_timed:
            raise ClusterError("node: an illegal memory access")
        return PlannedForward(ForwardSetting(batch_size=3), chosen="rule")

    said = run_on_gpus(data, tmp_path / "maps", monkeypatch, choose)
    assert asked == [True, False]
    assert "WARNING: node: an illegal memory access; it was timing forward settings, and one is chosen by rule" in said


def test_a_gpu_that_cannot_choose_is_a_sentence_and_leaves_no_output(tmp_path, data, monkeypatch):
    def choose(*_):
        raise ClusterError("node cannot choose how masks are scored")

    with pytest.raises(ClusterError, match="node cannot choose"):
        run_on_gpus(data, tmp_path / "maps", monkeypatch, choose)
    assert not list(store_of(tmp_path / "maps").list())


def test_an_error_of_the_device_over_the_choice_names_the_node(tmp_path, data, monkeypatch):
    context = []
    real = job.context_of

    def kept(*args):
        context.append(real(*args))
        return context[0]

    monkeypatch.setattr(job, "context_of", kept)
    run_here(data, tmp_path / "maps")

    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    request = setting_choice.ForwardRequest(None, 3)
    assert choose_here(context[0], None, request).setting == ForwardSetting(batch_size=3)
    with pytest.raises(ModelError, match="other weights"):
        choose_here(replace(context[0], facts=replace(context[0].facts, weights_sha256="0" * 64)), None, request)
    monkeypatch.setattr(forward_pass, "choose", fails)
    with pytest.raises(ClusterError, match=r".+ cannot choose how masks are scored: .*illegal memory access"):
        choose_here(context[0], None, request)


def test_of_two_drivers_that_choose_at_once_the_first_wins(tmp_path, data, monkeypatch):
    first = ForwardSetting(batch_size=3)

    def choose(*_):
        return None, [MeasuredSetting(ForwardSetting(batch_size=2))]

    def other_driver(output, plan):
        plan_setting(tmp_path / "maps", first)
        return real(output, plan)

    real = job.ensure_plan
    monkeypatch.setattr(forward_pass, "choose", choose)
    monkeypatch.setattr(job, "ensure_plan", other_driver)
    outcome = run_here(data, tmp_path / "maps")
    assert outcome.forward is not None
    assert outcome.forward.setting == first


def test_a_forward_setting_that_is_gone_is_not_chosen_anew_by_each_worker(tmp_path, data, monkeypatch):
    monkeypatch.setattr(step, "stored_forward", lambda *_: None)
    outcome = run_here(data, tmp_path / "maps")
    assert outcome.manifest is None
    (reason,) = {failure.error for failure in outcome.ran.failures}
    assert "forward setting is missing: _job/plan/forward.json" in reason


@pytest.mark.parametrize(
    ("options", "precision"),
    [({}, None), ({"preset": "paper"}, "float32"), ({"precision": "float16"}, "float16")],
)
def test_what_a_job_asks_for(tmp_path, options, precision):
    config = config_of(tmp_path, tmp_path / "out", **options)
    wanted = setting_choice.ForwardRequest(precision, 3, is_timed=True)
    assert forward_pass.forward_request(config, 3, is_timed=True) == wanted


def test_out_of_memory_halves_the_batch_for_all_units(tmp_path, monkeypatch):
    plan_setting(tmp_path / "maps", ForwardSetting(batch_size=3))
    real, failed = step.ExplainStep._explain_all, []

    def short(self, unit_input):
        if self.setting.batch_size > 1:
            failed.append((self.setting.batch_size, self.images_per_pass))
            raise torch.OutOfMemoryError("no room")
        return real(self, unit_input)

    monkeypatch.setattr(step.ExplainStep, "_explain_all", short)
    outcome = run_here(folder_of_images(tmp_path / "data", bad=False), tmp_path / "maps")
    assert outcome.manifest is not None
    assert failed == [(3, 4)]  # once, for all units
    assert {row["status"] for row in rows_in(store_of(tmp_path / "maps"))} == {"ok"}


def test_a_pass_with_a_heartbeat_keeps_its_buffer(monkeypatch):
    beats = []
    monkeypatch.setattr(step, "heartbeat", lambda: beats.append(1))
    own = BufferedForward(torch.zeros(2, 3, 4, 4), lambda batch: batch.sum((1, 2, 3))[:, None])
    beating = step.with_heartbeat(own)
    assert beating.buffer_nchw is own.buffer_nchw
    assert beating(torch.ones(2, 3, 4, 4)).flatten().tolist() == [48, 48]
    assert step.with_heartbeat(lambda batch: batch + 1)(1) == 2
    assert len(beats) == 2
