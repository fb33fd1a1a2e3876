"""The forward pass in its settings, and the probe that chooses one."""

import math
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch._inductor.config as inductor
from torch import nn
from torch._inductor.utils import run_and_get_code

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.scoring import forward, setting_choice
from blocksight.engine.scoring.forward import make_forward
from blocksight.engine.scoring.setting_choice import ForwardRequest, MeasuredSetting, choose
from tests.engine.comparing import assert_close
from tests.engine.nets import Depthwise, InPlace, Plain, Residual, seeded, smooth

ROOT = Path(__file__).resolve().parents[3]


def adapter_of(net=Depthwise):
    return ModelAdapter(seeded(net), input_size=(32, 32))


class OfFloat32(nn.Module):
    """Normalises with float32 constants, so that it does not run with half weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.sizes = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), []

    def forward(self, x):
        self.sizes.append(len(x))
        x = x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        return self.head(self.stem(x).relu().mean((2, 3)))


def logits(adapter, setting, inputs):
    with adapter.borrowed(), torch.inference_mode():
        return make_forward(adapter, setting)(inputs)


@pytest.mark.parametrize(
    ("backend", "net"),
    [
        *product(["eager", "openvino"], [Plain, Residual, Depthwise, InPlace]),
        ("compiled", Depthwise),  # a compilation takes seconds
        *(pytest.param("compiled", net, marks=pytest.mark.sweep) for net in (Plain, Residual, InPlace)),
    ],
)
def test_every_backend_computes_the_same(backend, net):
    adapter, inputs = adapter_of(net), smooth(3, 32, 32)
    wanted = logits(adapter, ForwardSetting(batch_size=3), inputs)
    found = logits(adapter, ForwardSetting(backend, batch_size=3), inputs)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_near_and_its_logits_are_float32(precision):
    adapter, inputs = adapter_of(), smooth(3, 32, 32)
    wanted = logits(adapter, ForwardSetting(batch_size=3), inputs)
    found = logits(adapter, ForwardSetting("eager", precision, 3), inputs)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
    assert next(adapter.module.parameters()).dtype == torch.float32


def test_openvino_reports_to_nobody():
    logits(adapter_of(), ForwardSetting("openvino"), smooth(4, 32, 32))
    assert sys.modules.get("openvino_telemetry") is None
    assert "openvino.tools.ovc.telemetry_stub" in sys.modules


def test_the_users_hooks_are_not_in_the_copy():
    adapter, inputs = adapter_of(), smooth(2, 32, 32)
    called = []
    adapter.module.register_forward_pre_hook(lambda *_: called.append(1))
    logits(adapter, ForwardSetting("eager", "bfloat16", 2), inputs)
    assert not called
    logits(adapter, ForwardSetting(batch_size=2), inputs)
    assert called


@pytest.mark.parametrize("backend", ["captured", "graphed"])
def test_a_backend_that_cannot_says_so_before_it_compiles(monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ModelError, match="need a CUDA device"):
        logits(adapter_of(), ForwardSetting(backend), smooth(4, 32, 32))


class Recorded:
    """A stand-in for torch.cuda that records what runs inside `graph`, and runs it again on `replay`."""

    def __init__(self, run):
        self.run, self.passes, self.is_recording = run, 0, False

    def __call__(self, inputs):
        self.passes += 1
        self.logits = self.run(inputs)
        if self.is_recording:
            self.inputs, self.kept = inputs, self.logits
        return self.logits

    def replay(self):
        self.kept.copy_(self.run(self.inputs))

    @contextmanager
    def graph(self, _graph):
        self.is_recording = True
        yield
        self.is_recording = False


def test_a_recorded_pass_reads_its_own_buffer_and_returns_logits_that_stay(monkeypatch):
    pass_ = Recorded(lambda inputs: inputs.sum((1, 2, 3))[:, None])
    for name, value in {
        "Stream": Mock(),
        "current_stream": Mock(),
        "stream": lambda _: nullcontext(),
        "graph": pass_.graph,
        "CUDAGraph": lambda: pass_,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    run = forward._recorded(pass_, torch.zeros(2, 3, 4, 4))
    assert pass_.passes == forward.NUM_WARM_UPS + 1
    first, second = run(torch.ones(2, 3, 4, 4)), run(torch.full((2, 3, 4, 4), 2.0))
    assert (first.flatten().tolist(), second.flatten().tolist()) == ([48, 48], [96, 96])
    assert pass_.passes == forward.NUM_WARM_UPS + 1


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_autocast_runs_a_model_that_half_weights_do_not(precision):
    adapter, inputs = adapter_of(OfFloat32), smooth(3, 32, 32)
    with pytest.raises(ModelError, match="eager cannot run model"):
        logits(adapter, ForwardSetting("eager", precision, 3), inputs)
    wanted = logits(adapter, ForwardSetting(batch_size=3), inputs)
    found = logits(adapter, ForwardSetting("eager", precision, 3, is_autocast=True), inputs)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_a_precision_that_is_asked_for_is_run_by_autocast_where_half_weights_do_not_run(monkeypatch):
    monkeypatch.setattr(setting_choice, "_cpu_compiler", lambda _: None)  # of some CPUs OpenVINO knows half precision
    _, found = choose(adapter_of(OfFloat32), ForwardRequest("float16"))
    assert found[0].setting == ForwardSetting("eager", "float16", 4, is_autocast=True)
    assert found[1].refused.startswith("eager cannot run model: ")


def test_settings_say_how_they_run():
    assert str(ForwardSetting("captured", "float16", 64)) == "captured float16, 64 per pass"
    assert ForwardSetting("eager", "float16", 64, is_autocast=True).protocol == "eager float16 autocast"


def test_a_compiled_pass_on_a_cpu_has_its_weights_as_constants_and_is_compiled_once():
    adapter, inputs = adapter_of(), smooth(3, 32, 32)
    with adapter.borrowed(), torch.inference_mode():
        run, code = run_and_get_code(make_forward, adapter, ForwardSetting("compiled", batch_size=3))
        assert "_frozen_param" in "".join(code)
        assert not inductor.freezing
        with torch.compiler.set_stance("fail_on_recompile"):
            run(inputs)


class Undecided(nn.Module):
    """What it computes depends on what it sees: no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, stride=2)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return x if x.sum().item() > 0 else x * 2


def test_a_model_that_a_compiler_refuses_is_one_sentence():
    adapter = adapter_of(Undecided)
    with pytest.raises(ModelError, match="openvino cannot run model: ") as raised:
        logits(adapter, ForwardSetting("openvino"), smooth(4, 32, 32))
    assert "\n" not in str(raised.value)


def test_the_explainer_scores_with_the_forward_that_it_is_given():
    adapter, inputs = adapter_of(), smooth(2, 32, 32)
    sizes = []

    def forward(batch):
        sizes.append(len(batch))
        return adapter.logits(batch)

    target = ClassProbability(torch.tensor([[0], [1]]))
    found = Sise(adapter, SiseParameters(), batch_size=5, forward=forward).explain(inputs, target)
    wanted = Sise(adapter, SiseParameters(), batch_size=5).explain(inputs, target)
    assert set(sizes) == {5}
    for one, other in zip(found, wanted, strict=True):
        assert_close(one[0], other[0])


def test_a_compiler_that_fails_at_the_first_call_is_one_sentence(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr("blocksight.engine.scoring.forward.torch.compile", lambda *_, **__: broken)
    with pytest.raises(ModelError, match=r"compiled cannot run model: no C\+\+ compiler$"):
        logits(adapter_of(), ForwardSetting("compiled"), smooth(4, 32, 32))


FREED_AND_SIGNALLED = """
import gc, os, signal, torch
from blocksight.engine.scoring.setting_choice import ForwardRequest, choose
from tests.engine.scoring.test_forward import adapter_of
from tests.engine.nets import smooth
torch.set_num_threads(1)
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
adapter = adapter_of()
forward, _ = choose(adapter, ForwardRequest())
del forward
gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
print("heard", heard)
"""


def test_a_process_that_let_a_forward_go_still_hears_signals():
    ran = subprocess.run(
        [sys.executable, "-c", FREED_AND_SIGNALLED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "heard [1]" in ran.stdout


# ---------------------------------------------------------------- the choice


class Clock:
    """Forward passes that take as long as they are told to."""

    def __init__(self, seconds, error=0.0, refused=None):
        self.seconds, self.error, self.refused = seconds, error, refused


def stub(monkeypatch, table):
    """Lets settings have these rates and errors instead of measured ones."""
    monkeypatch.setattr(setting_choice, "_candidates", lambda *_: iter(table))

    def make(_, setting):
        if setting in table and table[setting].refused is not None:
            raise ModelError(table[setting].refused)
        return setting

    monkeypatch.setattr(setting_choice, "make_forward", make)
    monkeypatch.setattr(setting_choice, "rate", lambda setting, *_: 1 / table[setting].seconds)
    monkeypatch.setattr(setting_choice, "_scores", lambda _adapter, forward, *_: forward)
    monkeypatch.setattr(setting_choice, "_score_error", lambda setting, _: table[setting].error)


EAGER, FAST, HALF, BFLOAT = (
    ForwardSetting(),
    ForwardSetting("compiled"),
    ForwardSetting("compiled", "float16"),
    ForwardSetting("compiled", "bfloat16"),
)
TIMED = ForwardRequest(is_timed=True)


@pytest.mark.parametrize(
    ("table", "taken"),
    [
        ({EAGER: Clock(1.0), FAST: Clock(0.5), HALF: Clock(0.2, 0.01)}, HALF),
        ({EAGER: Clock(1.0), FAST: Clock(0.5), HALF: Clock(0.2, 0.02)}, FAST),  # too far off
        ({EAGER: Clock(1.0), FAST: Clock(0.95)}, EAGER),  # not worth it
        ({EAGER: Clock(1.0), FAST: Clock(0.5, 1e-3)}, EAGER),  # float32, and wrong: a faulty conversion
        ({EAGER: Clock(1.0), FAST: Clock(0.5, refused="no"), HALF: Clock(0.4, 0.01)}, HALF),
        ({EAGER: Clock(1.0), HALF: Clock(0.5, 0.01), BFLOAT: Clock(0.48, 0.01)}, HALF),
        ({EAGER: Clock(1.0), HALF: Clock(0.5, math.inf), BFLOAT: Clock(0.5, 0.01)}, BFLOAT),
    ],
)
def test_where_passes_are_timed_the_fastest_sound_setting_is_taken(monkeypatch, table, taken):
    stub(monkeypatch, table)
    forward, found = choose(adapter_of(), TIMED)
    assert forward == taken
    assert found[0].setting == taken
    assert {one.setting for one in found} == set(table)


@pytest.mark.parametrize(
    ("table", "taken"),
    [
        ({FAST: Clock(9.0, 2e-6), EAGER: Clock(0.1)}, FAST),  # however long it takes
        ({FAST: Clock(0.1, 1e-3), EAGER: Clock(1.0)}, EAGER),  # wrong
        ({FAST: Clock(0.1, refused="no"), EAGER: Clock(1.0)}, EAGER),
    ],
)
def test_by_rule_the_first_sound_setting_is_taken_and_no_clock_is_read(monkeypatch, table, taken):
    stub(monkeypatch, table)
    monkeypatch.setattr(setting_choice, "rate", lambda *_: pytest.fail("a timing was taken"))
    _, found = choose(adapter_of(), ForwardRequest())
    assert found[0].setting == taken
    assert all(one.forwards_per_second is None for one in found)


def test_what_the_losing_passes_hold_is_free_before_the_work_begins(monkeypatch):
    made, alive = [], []

    def make(adapter, setting):
        def forward(inputs_nchw):
            return adapter.logits(inputs_nchw)

        made.append((setting, weakref.ref(forward)))
        return forward

    monkeypatch.setattr(setting_choice, "make_forward", make)
    monkeypatch.setattr(setting_choice, "find_spec", lambda _: "openvino")
    monkeypatch.setattr(setting_choice, "rate", lambda *_: 10.0 - len(made))  # the first wins
    monkeypatch.setattr(
        setting_choice, "empty_caches", lambda _: alive.extend(one for one, forward in made if forward() is not None)
    )
    forward, found = choose(adapter_of(), TIMED)
    assert len(made) > 2
    assert alive == [found[0].setting]
    assert forward is not None


def in_half(precision, size):
    """Eager with half weights, and by autocast."""
    return [ForwardSetting("eager", precision, size, is_autocast) for is_autocast in (False, True)]


@pytest.mark.parametrize(
    ("forward_request", "settings"),
    [
        (ForwardRequest(), [ForwardSetting("openvino", batch_size=8), EAGER]),
        (ForwardRequest(batch_size=3), [ForwardSetting("openvino", batch_size=3), ForwardSetting(batch_size=3)]),
        (
            ForwardRequest("bfloat16"),
            [ForwardSetting("openvino", "bfloat16", 8), *in_half("bfloat16", 4)],
        ),
        (ForwardRequest("float16"), in_half("float16", 4)),  # OpenVINO would silently compute in float32
        (TIMED, [EAGER, *(ForwardSetting("openvino", batch_size=size) for size in (8, 4, 16))]),
    ],
)
def test_the_rule_on_a_cpu(monkeypatch, forward_request, settings):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert tried("cpu", forward_request) == settings


def test_the_rule_on_a_cpu_without_openvino(monkeypatch):
    monkeypatch.setattr(setting_choice, "find_spec", lambda _: None)
    assert tried("cpu", ForwardRequest()) == [EAGER]
    assert tried("cpu", TIMED) == [EAGER, ForwardSetting("compiled", batch_size=8)]


def test_a_compiler_that_refuses_is_not_asked_again_at_other_sizes():
    assert tried("cpu", TIMED, refused=["openvino"]) == [EAGER, ForwardSetting("openvino", batch_size=8)]


def tried(device, forward_request, refused=(), error=0.0):
    """The candidates, where settings are refused whose words hold one of these; eager is faster in larger batches."""
    found, settings = [], []
    for setting in setting_choice._candidates(device, forward_request, found):
        no = "no" if any(words in str(setting) for words in refused) else None
        found.append(MeasuredSetting(setting, 0.0 if setting.precision == "float32" else error, setting.batch_size, no))
        settings.append(setting)
    return settings


def ladder(precision, sizes, backends=("captured", "graphed"), *, is_autocast=False):
    """Eager at these sizes, then other backends at the last one that runs."""
    steps = [("eager", size) for size in sizes] + [(backend, sizes[-1]) for backend in backends]
    return [ForwardSetting(backend, precision, size, is_autocast) for backend, size in steps]


SIZES = (64, 128, 256, 512)
EXACT = ForwardSetting(batch_size=256)
IN_HALF_WEIGHTS, BY_AUTOCAST = "float16, ", "float16 autocast"


@pytest.mark.parametrize(
    ("forward_request", "refused", "settings"),
    [
        (ForwardRequest(), (), [*in_half("float16", 256), EXACT]),
        (ForwardRequest("float32"), (), [EXACT]),
        (ForwardRequest("bfloat16"), (), in_half("bfloat16", 256)),
        (ForwardRequest("float32", is_timed=True), (), ladder("float32", SIZES)),  # preset paper
        (ForwardRequest("float16", 32, is_timed=True), (), ladder("float16", (32,))),
        (TIMED, (), [EXACT, *ladder("float16", SIZES)]),
        (
            TIMED,
            [IN_HALF_WEIGHTS],
            [EXACT, *ladder("float16", (64,), ()), *ladder("float16", SIZES, is_autocast=True)],
        ),
        (
            TIMED,
            [" " + IN_HALF_WEIGHTS, " " + BY_AUTOCAST],
            [
                EXACT,
                *(step for half in (False, True) for step in ladder("float16", (64,), (), is_autocast=half)),
                *ladder("bfloat16", SIZES),
            ],
        ),
        (TIMED, ["captured"], [EXACT, *ladder("float16", SIZES, ("captured", "compiled"))]),
        (TIMED, ["graphed"], [EXACT, *ladder("float16", SIZES, ("captured", "graphed", "compiled"))]),
    ],
)
def test_the_rule_on_a_gpu(forward_request, refused, settings):
    assert tried("cuda", forward_request, refused) == settings


def test_on_a_gpu_sizes_end_where_one_does_not_fit():
    found = tried("cuda", TIMED, refused=["eager float16, 256"])
    assert found[:4] == [EXACT, *(ForwardSetting("eager", "float16", size) for size in (64, 128, 256))]
    assert {one.batch_size for one in found[4:]} == {128}


def test_on_a_gpu_no_compiler_is_asked_for_a_precision_that_is_not_sound():
    found = tried("cuda", TIMED, error=0.1)
    assert {one.precision for one in found if one.backend != "eager"} == {"float32"}
    assert [one.batch_size for one in found if one.precision == "float32"] == [256, 64, 128, 512, 512, 512]


def test_what_does_not_fit_is_passed_over(monkeypatch):
    real = setting_choice.make_forward

    def short(adapter, setting):
        if setting.backend != "eager":
            raise torch.OutOfMemoryError("no room")
        return real(adapter, setting)

    monkeypatch.setattr(setting_choice, "make_forward", short)
    _, found = choose(adapter_of(), ForwardRequest())
    assert found[0].setting.backend == "eager"
    assert {one.refused for one in found[1:]} == {"no room"}


def test_a_setting_in_which_the_model_does_not_run_is_refused_and_ends_nothing(monkeypatch):
    settings = (EAGER, ForwardSetting("eager", "float16"), ForwardSetting("eager", batch_size=8))
    monkeypatch.setattr(setting_choice, "_candidates", lambda *_: iter(settings))
    _, found = choose(adapter_of(OfFloat32), TIMED)
    reasons = {one.setting: one.refused for one in found}
    assert reasons.pop(settings[1]).startswith("eager cannot run model: ")
    assert list(reasons.values()) == [None, None]


@pytest.mark.parametrize("place", ["make_forward", "_score_error", "rate"])
@pytest.mark.parametrize("error", [RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), torch.OutOfMemoryError("no room")])
def test_any_failure_while_a_setting_is_measured_refuses_that_setting_alone(monkeypatch, place, error):
    stub(monkeypatch, {EAGER: Clock(1.0), FAST: Clock(0.5)})
    real = getattr(setting_choice, place)

    def failing(first, *rest):
        if FAST in (first, *rest):
            raise error
        return real(first, *rest)

    monkeypatch.setattr(setting_choice, place, failing)
    _, found = choose(adapter_of(), TIMED)
    assert [(one.setting, one.refused) for one in found] == [(EAGER, None), (FAST, str(error))]


def test_a_lost_device_is_no_refusal(monkeypatch):
    stub(monkeypatch, {EAGER: Clock(1.0), FAST: Clock(0.5)})

    def lost(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(setting_choice, "rate", lost)
    with pytest.raises(torch.AcceleratorError):
        choose(adapter_of(), TIMED)


@pytest.mark.parametrize(
    ("fits", "is_first_pass", "error"),
    [
        (2, True, torch.OutOfMemoryError("no room")),
        (1, True, torch.OutOfMemoryError("no room")),
        (1, False, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")),
    ],
)
def test_the_reference_of_errors_takes_smaller_batches_where_memory_is_short(monkeypatch, fits, is_first_pass, error):
    adapter, sizes = adapter_of(), []

    def short(inputs_nchw):
        sizes.append(len(inputs_nchw))
        if len(inputs_nchw) > fits and (is_first_pass or sizes.count(len(inputs_nchw)) > 1):
            raise error
        return adapter.module(inputs_nchw)

    monkeypatch.setattr(adapter, "logits", short)
    _, found = choose(adapter, ForwardRequest())
    assert found[0].setting.backend == "openvino"
    assert sizes.count(fits) == 1 + setting_choice.NUM_MASKED_PICTURES // fits
    assert sizes[-1] == fits


@pytest.mark.parametrize("size", [2, 16, 64])
def test_a_setting_is_measured_in_batches_of_its_own_size(monkeypatch, size):
    net = seeded(OfFloat32)
    monkeypatch.setattr(setting_choice, "_candidates", lambda *_: iter([ForwardSetting(batch_size=size)]))
    choose(ModelAdapter(net, input_size=(32, 32)), TIMED)
    reference = 1 + setting_choice.NUM_MASKED_PICTURES // 4
    assert set(net.sizes[reference:]) == {size}
    assert len(net.sizes) > reference + setting_choice.NUM_REPEATS


def test_a_rate_is_that_of_batches_in_the_forwards_own_buffer():
    given = []

    class Noted(forward.BufferedForward):
        def __call__(self, inputs_nchw):
            given.append(inputs_nchw)
            return super().__call__(inputs_nchw)

    own = Noted(torch.zeros(4, 1, 1, 1), lambda batch: batch)
    setting_choice.rate(own, torch.ones(3, 1, 1, 1), 4)
    assert given
    assert all(batch is own.buffer_nchw for batch in given)
    assert own.buffer_nchw.flatten().tolist() == [1, 1, 1, 1]


def test_a_rate_is_that_of_a_full_batch():
    sizes = []
    setting_choice.rate(lambda batch: sizes.append(len(batch)), torch.zeros(3, 1, 1, 1), 8)
    assert set(sizes) == {8}


def test_where_nothing_is_sound_the_plain_model_is_taken(monkeypatch):
    stub(monkeypatch, {EAGER: Clock(1.0, math.inf), FAST: Clock(0.5, refused="no")})
    adapter = adapter_of()
    forward, found = choose(adapter, TIMED)
    assert forward == adapter.logits
    assert found[0].setting == EAGER
    assert [one.figures()["score_error"] for one in found] == [0.0, None, 0.0]


@pytest.mark.parametrize("error", [0.3, math.inf])
def test_a_precision_that_is_asked_for_and_of_no_use_is_refused_with_its_error(monkeypatch, error):
    stub(monkeypatch, {HALF: Clock(1.0, error), BFLOAT: Clock(1.0, refused="no such unit")})
    with pytest.raises(ModelError, match=rf"a score error of {error}.*no such unit.*the limit is 0.25.*--precision"):
        choose(adapter_of(), ForwardRequest("float16"))


def test_a_precision_that_is_asked_for_may_be_less_exact_than_one_that_is_not(monkeypatch):
    stub(monkeypatch, {BFLOAT: Clock(1.0, 0.05)})
    _, (taken,) = choose(adapter_of(), ForwardRequest("bfloat16"))
    assert (taken.setting, taken.score_error) == (BFLOAT, 0.05)


@pytest.mark.parametrize(
    "forward_request", [ForwardRequest(), ForwardRequest("bfloat16"), ForwardRequest(batch_size=3), TIMED]
)
def test_what_is_taken_scores_like_the_model(monkeypatch, forward_request):
    adapter = adapter_of()
    forward, found = choose(adapter, forward_request)
    bound = 1e-5 if found[0].setting.precision == "float32" else 0.05
    batch = smooth(found[0].setting.batch_size, 32, 32)
    with adapter.borrowed(), torch.inference_mode():
        wanted = adapter.logits(batch)
        assert (forward(batch) - wanted).abs().max() <= bound * wanted.abs().max()
    assert forward_request.batch_size in (None, found[0].setting.batch_size)
    assert all(
        (one.forwards_per_second is None) == (not forward_request.is_timed) for one in found if one.refused is None
    )


def test_the_choice_is_the_same_each_time_to_the_last_digit():
    first, second = ([one.figures() for one in choose(adapter_of(), ForwardRequest("bfloat16"))[1]] for _ in range(2))
    assert first == second
    assert first[0]["score_error"] > 0


def test_errors_are_measured_on_masked_pictures_that_no_data_changes():
    adapter = adapter_of()
    pictures = setting_choice.drawn_pictures(adapter)
    assert torch.equal(pictures, setting_choice.drawn_pictures(adapter))
    masked = setting_choice._masked_pictures(pictures)
    assert masked.shape == (32, 3, 32, 32)
    shares = masked / pictures[torch.arange(32) % 8]
    shares = shares[pictures[torch.arange(32) % 8].abs() > 0.01]
    assert shares.min() >= -1e-5
    assert shares.max() <= 1 + 1e-5
    assert shares.std() > 0.1


def test_an_error_by_hand():
    wanted = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]]).double()
    scores = torch.tensor([[0.88, 0.12], [0.5, 0.5], [0.1, 0.9]]).double()
    assert setting_choice._score_error(scores, wanted) == 0.0  # the median
    scores[2, 1] = 0.45
    assert setting_choice._score_error(scores, wanted) == pytest.approx(0.1)
    scores[2, 1] = torch.nan
    assert setting_choice._score_error(scores, wanted) == math.inf
    assert not MeasuredSetting(EAGER, score_error=math.inf).is_sound(ForwardRequest())
