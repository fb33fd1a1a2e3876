"""The report: its figures are those of `status` and `compare`, its texts are escaped, its size is bounded."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from blocksight.engine.catalog.entries import METRICS
from blocksight.jobs.audit.examples import NUM_EXAMPLES
from blocksight.jobs.audit.result import write_audit
from blocksight.jobs.evaluate.compare import Output, compare
from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables
from blocksight.jobs.evaluate.verdict import verdicts
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY, final_manifest, read_job_state
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.plan import existing_plan
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.text import percent, plain
from blocksight.jobs.report import galleries
from blocksight.jobs.report.content import report_of
from blocksight.jobs.report.facts import Fact, duration, run_facts, size
from blocksight.jobs.report.findings import MAX_CHANGE_BYTES, MAX_SHORTCUTS, place_of
from blocksight.jobs.report.galleries import (
    MAX_BYTES,
    MAX_FILM_BYTES,
    MAX_PICTURES,
    MAX_SINGLE_BYTES,
    SIDE,
    Least,
    Ref,
)
from blocksight.jobs.report.page import REPORT_KEY, render, write_report
from blocksight.jobs.report.products import MAX_BEST
from blocksight.jobs.run.evaluation import EvaluationRequest, run_evaluation
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import open_store
from tests.jobs.audits import audited
from tests.jobs.jobs_of import blocksight, called, model_of, rows_in, run_here
from tests.jobs.outputs import output_of_small_units
from tests.jobs.side_products import OF_METHODS, blocks, grids, with_products
from tests.jobs.tiny import HOSTILE, bad_bodies, folder_of_images, folder_of_tars, hostile_table

LOSSES = "loss 2.31 at the first, 0.46 at the last"
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def output_at(where, endpoint_url=None):
    store = open_store(str(where), endpoint_url)
    return Output(str(where), store, existing_plan(store))


def report_at(where):
    return report_of(output_at(where), None, NOW, lambda *_: lambda: None)


def about_the_job(report):
    """The notices, without those about the tiny model, which is right by chance."""
    return [notice for notice in report.notices if "THE MODEL IS" not in notice.text]


def page_at(where):
    write_report(output_at(where), None, Console(quiet=True))
    return (where / REPORT_KEY).read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return output_of_small_units(tmp_path_factory.mktemp("finished"), patch)


@pytest.fixture(scope="module")
def finished_and_evaluated(finished, tmp_path_factory):
    output = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "out")
    asked = EvaluationRequest(
        output=str(output),
        model=model_of(output),
        metrics="insertion,entropy",
        share=1.0,
        controls=True,
        seed=0,
        baseline="zero",
        truth=None,
        class_map=None,
        weights=None,
        endpoint_url=None,
    )
    run_evaluation(asked, Execution(runner="local"), Console(quiet=True))
    return output


@pytest.fixture
def output(finished, tmp_path):
    """A copy of a finished output, which a test may change; its images are those of all tests."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def evaluated(finished_and_evaluated, tmp_path):
    return shutil.copytree(finished_and_evaluated, tmp_path / "out")


class Page(HTMLParser):
    """The text and attributes of a page, as a browser would parse them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.blocks = [], [], [], {"style": "", "script": ""}
        self.inside = ""
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in self.blocks:
            self.blocks[self.inside] += data
        else:
            self.words.append(data)

    def values(self, name):
        return [value for _, own, value in self.attributes if own == name]


# ---------------------------------------------------------------- figures


def test_metrics_are_those_of_compare_with_direction_and_unit(evaluated):
    table, found = compare([output_at(evaluated)]), report_at(evaluated).metrics
    assert [(metric.name, metric.protocol) for metric in found] == [
        (column.metric, column.protocol) for column in table.columns
    ]
    cells = [estimate.cell for metric in found for estimate in metric.estimates]
    assert cells == [cell for cell in table.cells if cell.estimate.mean is not None]
    assert {estimate.method for metric in found for estimate in metric.estimates if estimate.is_control} == {
        "random",
        "gaussian",
        "edges",
    }
    for metric in found:
        assert (metric.better, metric.unit) == (METRICS[metric.name].better, METRICS[metric.name].unit)
    page = Page(page_at(evaluated)).text
    own = next(cell for cell in table.cells if cell.column.metric == "insertion").estimate
    assert f"{own.mean:.3f} {own.low:.3f} to {own.high:.3f}, {own.count} maps" in page


def test_accuracy_flat_maps_and_the_verdict_are_those_of_status_and_compare(evaluated):
    page = Page(page_at(evaluated)).text
    output = output_at(evaluated)
    state = read_job_state(output.store, output.plan)
    for sentence in (*state.accuracy.facts, state.flat_fact, *state.warnings, *verdicts(compare([output]))):
        assert sentence in page
    assert f"{percent(state.accuracy.share)} right" in page  # a tile


def test_a_mean_is_drawn_at_its_value_on_its_axis(evaluated):
    metric = next(metric for metric in report_at(evaluated).metrics if metric.name == "drop")
    assert metric.end == 100.0
    assert [metric.place(value) for value in (-1.0, 0.0, 25.0, 100.0, 120.0)] == [0.0, 0.0, 25.0, 100.0, 100.0]


def test_records_are_those_of_status_and_of_the_manifest(output):
    own, manifest = report_at(output).accounting, final_manifest(LocalStore(output), existing_plan(LocalStore(output)))
    assert manifest is not None
    assert (own.num_records, own.num_ok, own.num_rejected) == (10, 7, 3)
    for name in ("num_records", "num_ok", "num_rejected", "num_rows", "num_units"):
        assert getattr(own, name) == manifest[name]
    assert own.num_records == own.num_ok + own.num_rejected == own.num_planned
    assert {share.name: share.count for share in own.rejects} == manifest["rejects"]
    assert {one.code for one in own.examples} == set(bad_bodies())
    assert sum(share.share for share in own.rejects) == pytest.approx(1.0)


def test_cost_is_what_the_receipts_say(output):
    job_state = read_job_state(LocalStore(output), existing_plan(LocalStore(output)))
    facts = {fact.name: fact for fact in report_at(output).cost}
    seconds = sum(receipt.explain_seconds or 0.0 for receipt in job_state.receipts.values())
    assert facts["worker time"].value == duration(seconds)
    assert facts["throughput"].value == f"{10 / seconds:,.3g} records/s"
    assert job_state.total("num_forwards") == 0
    assert "masked forwards" not in facts  # Grad-CAM masks nothing
    assert facts["output"].value == size(job_state.total("num_bytes"))


def test_provenance_changes_with_a_fragments_bytes_and_tells_no_place(output):
    first = {fact.name: fact.value for fact in report_at(output).provenance}
    assert first["plan fingerprint"] == existing_plan(LocalStore(output)).fingerprint
    assert first["weights sha256"] == json.loads((output / "_job/plan/model.json").read_text())["weights_sha256"]
    receipt = next((output / "_job/receipts").iterdir())
    own = json.loads(receipt.read_text().splitlines()[0])["sha256"]
    receipt.write_text(receipt.read_text().replace(own, "0" * 64))
    second = {fact.name: fact.value for fact in report_at(output).provenance}
    assert {name for name in first if first[name] != second[name]} == {"fragments"}
    run = next((output / "_job/runs").glob("*/run.json"))
    document = json.loads(run.read_text())
    document["execution"]["address"], document["host"] = "ray://user:secret-word@head", "secret-host"
    run.write_text(json.dumps(document))
    page = page_at(output)
    assert document["packages"]["pyarrow"] in page
    assert "secret" not in page


# ---------------------------------------------------------------- which maps


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, float("nan")]), st.integers(0, 9)), unique=True), st.data())
def test_the_least_are_the_same_in_any_order_and_partition(offers, data):
    shuffled = data.draw(st.permutations(offers))
    cut = data.draw(st.integers(0, len(offers)))
    least = Least(4)
    for part in (shuffled[:cut], shuffled[cut:]):
        ranks = np.array([rank for rank, _ in part], float)
        least.offer(ranks, np.array([tie for _, tie in part], np.uint64), part.__getitem__)
    assert list(least.values) == sorted(offer for offer in offers if offer[0] == offer[0])[:4]


def test_best_and_worst_are_those_of_all_rows(evaluated, monkeypatch):
    monkeypatch.setattr(galleries, "NUM_RANKED", 3)
    shown = {gallery.name: gallery.refs for gallery in report_at(evaluated).galleries}
    rows = [row for row in rows_in(LocalStore(evaluated)) if row["status"] == "ok"]
    drops = sorted((row["metrics"]["drop"], row["key"], row["target"]) for row in rows)
    drop_of = {Ref(key, target): drop for drop, key, target in drops}
    assert [drop_of[ref] for ref in shown["best-drop"]] == [drop for drop, *_ in drops[:3]]
    assert [drop_of[ref] for ref in shown["worst-drop"]] == [drop for drop, *_ in drops[::-1][:3]]
    assert len(shown["best-insertion"]) == len(shown["worst-insertion"]) == 3
    assert set(shown["best-insertion"]) != set(shown["worst-insertion"])


def test_a_ranked_map_shows_its_values_on_its_card_and_beside_it(evaluated, monkeypatch):
    monkeypatch.setattr(galleries, "NUM_RANKED", 3)
    report, store = report_at(evaluated), LocalStore(evaluated)
    rows = {Ref(row["key"], row["target"]): row for row in rows_in(store) if row["status"] == "ok"}
    tables = [table.to_pylist() for folder in evaluation_folders(store) for table in value_tables(store, folder)]
    insertion = {
        Ref(row["key"], row["target"]): row["value"]
        for row in (row for table in tables for row in table)
        if (row["explainer"], row["metric"]) == ("gradcam", "insertion")
    }
    assert {gallery.metric for gallery in report.galleries} == {None, "drop", "insertion"}
    for item in report.items:
        ref, facts = Ref(item.key, item.target), [(fact.name, fact.value) for fact in item.facts]
        wanted = {"drop": f"{rows[ref]['metrics']['drop']:.2f} %", "insertion": f"{insertion[ref]:.3f}"}
        names = {name.partition("-")[2] for name in item.galleries if "-" in name}
        assert {fact.name: fact.value for fact in item.ranked} == {name: wanted[name] for name in names}
        assert facts.count(("drop", wanted["drop"])) == 1
        assert facts.count(("insertion", wanted["insertion"])) == ("insertion" in names)
    text = Page(page_at(evaluated)).text
    for item in report.items:
        for fact in item.ranked:
            assert f"{item.key.rpartition('/')[2]} " in text
            assert f" {fact.name} {fact.value}" in text


def test_every_map_has_the_same_chance_and_each_class_some(output):
    report = report_at(output)
    shown = {gallery.name: gallery.refs for gallery in report.galleries}
    rows = [row for row in rows_in(LocalStore(output)) if row["status"] == "ok"]
    assert set(shown["random"]) == {Ref(row["key"], row["target"]) for row in rows}  # fewer than fit
    assert {ref.target for ref in shown["class"]} == {row["target"] for row in rows}
    assert [item.number for item in report.items] == list(range(len(rows)))
    again = {gallery.name: gallery.refs for gallery in report_at(output).galleries}
    assert again == shown


def test_no_more_maps_are_shown_than_there_is_room_for(output, monkeypatch):
    monkeypatch.setattr(galleries, "MAX_PICTURES", 4)
    report = report_at(output)
    assert len(report.items) == 4
    assert {ref for gallery in report.galleries for ref in gallery.refs} == {
        Ref(item.key, item.target) for item in report.items
    }


def test_a_picture_is_small_whatever_it_shows():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    smooth = np.zeros((SIDE, SIDE, 3), np.uint8)
    for most_bytes in MAX_BYTES.values():
        assert len(galleries.jpeg(smooth, most_bytes)) <= len(galleries.jpeg(noise, most_bytes)) <= most_bytes
    assert MAX_PICTURES * sum(MAX_BYTES.values()) * 4 / 3 < 7_000_000


def test_records_of_other_layouts_are_shown_too(tmp_path):
    run_here(folder_of_tars(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    items = report_at(tmp_path / "out").items
    assert len(items) == sum(row["status"] == "ok" for row in rows_in(LocalStore(tmp_path / "out")))
    assert not any(item.picture.is_gone for item in items)


def test_images_that_are_gone_are_grey(tmp_path, monkeypatch):
    output = output_of_small_units(tmp_path, monkeypatch)
    assert report_at(output).num_gone == 0
    with_images = {item.key: item.picture for item in report_at(output).items}
    shutil.rmtree(tmp_path / "in")
    report = report_at(output)
    assert report.num_gone == len(report.items) > 0
    for item in report.items:
        assert item.picture.image != with_images[item.key].image
    assert f"{report.num_gone} images cannot be read any more" in Page(page_at(output)).text


# ---------------------------------------------------------------- side products


def test_what_was_found_beside_the_maps_is_shown_for_a_few(output, monkeypatch):
    monkeypatch.setattr(galleries, "NUM_WITH_PRODUCTS", 3)
    with_products(LocalStore(output), *OF_METHODS)
    report = report_at(output)
    shown = [item for item in report.items if item.products]
    assert [Ref(item.key, item.target) for item in shown] == list(report.galleries[0].refs[:3])
    for item in shown:
        assert {part.title: len(part.frames) for part in item.products} == {
            "Accumulated maps": 5,
            "Scan path": 1,
            "Crops": 1,
            "Map family": 8,
            "Channel importance": 1,
        }
    page = Page(page_at(output))
    assert "#products" in page.values("href")
    alts = [alt for alt in page.values("alt") if alt.startswith("Accumulated maps: ")]
    masses = [sum(one["values"]) for one in blocks(5)]
    wanted = [f"block {place}, {100 * mass / masses[-1]:.1f} % of the mass" for place, mass in enumerate(masses)]
    assert alts[:5] == [f"Accumulated maps: {own}" for own in wanted]
    assert len(alts) == 3 * 5
    assert sum(alt.startswith("Map family: chosen: ") for alt in page.values("alt")) == 3
    for words in (
        "5 fixations, loss 2.31 at the first, 0.46 at the last",
        "the sum up to each block",
        "by hed",
    ):
        assert words in page.text


def test_every_shown_map_says_what_was_found_beside_it(output):
    with_products(LocalStore(output), "fovex", "feature-cam")
    for item in report_at(output).items:
        facts = {fact.name: fact.value for fact in item.facts}
        assert (facts["scan path"], facts["edges"]) == (
            "5 fixations, loss 2.31 at the first, 0.46 at the last",
            "by hed",
        )


def test_a_method_without_side_products_has_no_such_section(output):
    page = Page(page_at(output))
    assert not {"#products", "products"} & {*page.values("href"), *page.values("id")}


def test_pictures_of_side_products_keep_the_page_small():
    num_films, num_singles = 2, 3
    most = num_films * galleries.PRODUCT_SIZES.most * MAX_FILM_BYTES + num_singles * MAX_SINGLE_BYTES
    assert galleries.PRODUCT_SIZES.most >= MAX_BEST
    crops = MAX_SHORTCUTS * 2 * NUM_EXAMPLES * 2 * MAX_CHANGE_BYTES
    maps = galleries.NUM_WITH_PRODUCTS * most + MAX_PICTURES * sum(MAX_BYTES.values())
    assert (crops + maps) * 4 / 3 < 8_500_000
    noise = np.random.default_rng(0).integers(0, 256, (galleries.PRODUCT_SIZES.single,) * 2 + (3,), dtype=np.uint8)
    assert len(galleries.jpeg(noise, MAX_SINGLE_BYTES)) <= MAX_SINGLE_BYTES
    small = noise[: galleries.PRODUCT_SIZES.film, : galleries.PRODUCT_SIZES.film]
    assert len(galleries.jpeg(small, MAX_FILM_BYTES)) <= MAX_FILM_BYTES


def test_hostile_names_of_blocks_are_text(output):
    with_products(LocalStore(output), accumulated_maps=grids(list(HOSTILE), [None] * len(HOSTILE)))
    page = Page(page_at(output))
    assert set(page.tags) <= TAGS
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<img src=x onerror=alert(1)>.png" in page.text


@pytest.mark.parametrize(
    ("explainer", "expected"),
    [
        ("a-fmi", "a-fmi: a reconstruction from the abstract"),
        ("feature-cam(gradcam)", "feature-cam: a reconstruction from the abstract"),
        ("smoothgrad(feature-cam(a-fmi))", "feature-cam, a-fmi: a reconstruction from the abstract"),
        ("ucag(gradcam)", None),
    ],
)
def test_the_page_says_which_methods_are_reconstructions(output, explainer, expected):
    plan = existing_plan(LocalStore(output))
    values = {"b": 1, "base": {"mu": 0.3, "base": {"a": None}}}
    named = replace(plan, identity={**plan.identity, "explainer": explainer, "parameters": values})
    facts = {fact.name: fact.value for fact in run_facts(named, {}, {}, None)}
    assert facts.get("origin", "").startswith(expected or "")
    assert ("origin" in facts) == (expected is not None)
    assert facts["parameters"] == "b = 1, base.base.a = None, base.mu = 0.3"


# ---------------------------------------------------------------- what is missing


def test_an_output_without_an_audit_names_the_command(output):
    report = report_at(output)
    assert report.findings is None
    assert [notice.command for notice in about_the_job(report)] == [f"blocksight audit {output}"]
    assert f"blocksight audit {output}" in Page(page_at(output)).text


def test_an_audit_of_other_fragments_is_shown_and_called_old(output):
    audited(LocalStore(output))
    assert about_the_job(report_at(output)) == []
    audited(LocalStore(output), fragments="others")
    report = report_at(output)
    assert ["out of date" in notice.text for notice in about_the_job(report)] == [True]
    assert about_the_job(report)[0].command == f"blocksight audit {output}"
    assert report.findings is not None


def test_an_unfinished_output_says_so(output):
    for file in sorted((output / "data").rglob("*.parquet"), key=lambda file: file.name)[1:]:
        file.unlink()
    (output / MANIFEST_KEY).unlink()
    report = report_at(output)
    assert report.accounting.num_open > 0
    assert f"{report.accounting.num_open} unit" in about_the_job(report)[0].text
    assert "not finished" in Page(page_at(output)).text


def test_an_output_without_open_units_and_manifest_names_finalize(output):
    (output / MANIFEST_KEY).unlink()
    assert about_the_job(report_at(output))[0].command == f"blocksight finalize {output}"


def test_an_empty_output_gets_a_page(output):
    shutil.rmtree(output / "data")
    report = report_at(output)
    assert (report.items, report.metrics, report.accounting.num_records) == ((), (), 0)
    text = Page(page_at(output)).text
    assert "This output has no map yet." in text
    assert "This output has no value of any metric." in text


def test_an_output_of_rejects_alone_gets_a_page(tmp_path):
    (tmp_path / "in").mkdir()
    for code, body in bad_bodies().items():
        (tmp_path / "in" / f"{code}.jpg").write_bytes(body)
    run_here(tmp_path / "in", tmp_path / "out", explainer="gradcam")
    report = report_at(tmp_path / "out")
    assert (report.accounting.num_ok, report.accounting.num_rejected) == (0, 3)
    text = Page(page_at(tmp_path / "out")).text
    assert all(code in text for code in bad_bodies())


# ---------------------------------------------------------------- the audit


def test_the_audits_figures_are_on_the_page(output):
    audit = audited(LocalStore(output))
    page = Page(page_at(output))
    for words in (
        "Finding",
        "Suspicion",
        "bottom right",
        "by 1.25 [0.75, 1.50] more than with a random region",
        "p = 0.004",
        "\N{MINUS SIGN}12.5 points",
        "62.5 %",
    ):
        assert words in page.text
    found = report_at(output).findings
    assert found is not None
    assert [(gate.name, gate.count) for gate in found.gates] == list(audit.gates.items())
    assert [name for name, *_ in found.measures] == list(audit.groups[0].spreads)
    assert [one.about for one in found.oddities] == list(audit.oddities)
    assert [len(own) for _, own in found.clusters] == [2]


def test_what_the_audit_names_leads_to_a_map(output):
    audit = audited(LocalStore(output))
    report, page = report_at(output), Page(page_at(output))
    assert report.findings is not None
    finding = report.items[report.findings.shortcuts["finding"][0].items[0]]
    assert (finding.key, finding.target) == (audit.shortcuts[0].members[0], str(audit.shortcuts[0].target_index))
    assert {gallery.name for gallery in report.galleries} >= {"findings", "suspicions", "oddities", "clusters"}
    places = [value for value in page.values("href") if value.startswith("#map-")]
    assert len(places) == 2 + 2 + 3
    assert {value.removeprefix("#") for value in places} <= set(page.values("id"))


def test_the_page_names_each_effect_that_is_real(output):
    audit = audited(LocalStore(output))
    removed = "Painted out, its log-odds fall by 1.25 [0.75, 1.50] more than with a random region"
    assert removed in Page(page_at(output)).text
    weak = replace(audit.shortcuts[0], pasted=replace(audit.shortcuts[0].blanked, p_value=0.5), is_confirmed=False)
    write_audit(LocalStore(output), replace(audit, shortcuts=(weak,)))
    text = Page(page_at(output)).text
    assert removed in text
    assert "Pasted into other images, its log-odds rise no differently than with a random region" in text


def test_effects_of_raw_outputs_are_called_outputs(output):
    audit = audited(LocalStore(output))
    raw = replace(audit.shortcuts[0].blanked, scale="outputs", probability=None)
    others = tuple(replace(one, blanked=raw, pasted=raw) for one in audit.shortcuts)
    write_audit(LocalStore(output), replace(audit, shortcuts=others))
    text = Page(page_at(output)).text
    assert "Painted out, its outputs fall by 1.25 [0.75, 1.50] more than with a random region" in text
    assert "Effects are differences of the class's output, beyond" in text
    assert "output 0.250 before, 0.750 after" in text
    assert "log-odds" not in text
    assert "the probability itself" not in text


def test_a_finding_shows_its_crop_before_and_after(output):
    audited(LocalStore(output))
    page = page_at(output)
    assert "probability 25.0 % before, 75.0 % after" in Page(page).text
    assert page.count('alt="Before"') == page.count('alt="After"') == 1
    (output / "audit" / "examples.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnreconciledError, match=r"examples\.parquet is damaged, `blocksight audit` makes it again"):
        page_at(output)
    (output / "audit" / "examples.parquet").unlink()  # as an older audit leaves it
    assert 'alt="Before"' not in page_at(output)


def test_wrong_predictions_are_marked_and_have_a_gallery(output):
    report, rows = report_at(output), [row for row in rows_in(LocalStore(output)) if row["status"] == "ok"]
    known = {(row["key"], row["target"]): row["label_rank"] == 1 for row in rows if row["label"] is not None}
    assert {True, False} <= set(known.values())
    for item in report.items:
        assert item.is_right == known.get((item.key, item.target))
    [gallery] = [own for own in report.galleries if own.name == "wrong"]
    assert all(not known[ref] for ref in gallery.refs)
    predicted = {(row["key"], row["target"]): row["score"] for row in rows if row["target_rank"] == 1}
    scores = [predicted[ref] for ref in gallery.refs if ref in predicted]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == min(24, sum(not known[ref] for ref in predicted if ref in known))
    page = page_at(output)
    assert page.count('<span class="wrong">') == sum(item.is_right is False for item in report.items)


def test_workers_are_those_that_the_runs_wrote_down(output):
    def workers():
        return [(fact.value, fact.note[:9]) for fact in report_at(output).cost if fact.name == "workers"]

    assert workers() == [("the command's own process", "in 1 run,")]
    [file] = (output / "_job" / "runs").glob("*/run.json")
    run = json.loads(file.read_text())
    sizing = {"num_actors": 2, "gpus_per_actor": 0.0, "cpus_per_actor": 0.9, "cpus_per_task": 0.1}
    file.write_text(json.dumps({**run, "sizing": {**sizing, "threads_per_actor": 1}}))
    assert workers() == [("2 explain actors with 1 CPU thread each", "in 1 run,")]
    assert Fact("workers", "2 explain actors with 1 CPU thread each") in report_at(output).runs[0]
    file.write_text(json.dumps({**run, "sizing": sizing}))
    assert workers() == [("not recorded", "in 1 run,")]


def test_the_page_has_the_maps_colours_and_one_table_of_metrics(output):
    page = page_at(output)
    assert 'alt="The colours of a map' in page
    report = report_at(output)
    table = page[page.index('<table class="metric-table">') :].split("</table>")[0]
    assert table.count('<th scope="row">') == len(report.metrics) > 0


def test_findings_come_before_maps_suspicions_after_and_what_was_not_confirmed_is_folded(output):
    audit = audited(LocalStore(output))
    none = replace(audit.shortcuts[0].blanked, p_value=0.5)
    tested = replace(audit.shortcuts[0], blanked=none, pasted=none, is_confirmed=False)
    write_audit(LocalStore(output), replace(audit, shortcuts=(*audit.shortcuts, tested)))
    page = page_at(output)
    order = [
        '<p class="tag">Finding',
        'id="maps-title"',
        '<p class="tag">Suspicion',
        "<details><summary>Tested, not con",
    ]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert page.index('<p class="tag">Tested, not confirmed') > places[-1]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 0.3, 0.3), "top left"),
        ((0.35, 0.35, 0.65, 0.65), "middle"),
        ((0.7, 0.4, 1, 0.6), "right"),
        ((0.1, 0.8, 0.9, 1), "bottom"),
        ((0, 0, 1, 0.9), "most of the picture"),
    ],
)
def test_a_region_in_words(box, expected):
    assert place_of(box) == expected


# ---------------------------------------------------------------- harmless


@pytest.fixture
def hostile(tmp_path):
    """An output whose keys, labels, class names and audit texts are hostile."""
    run_here(
        hostile_table(tmp_path / "in"), tmp_path / "out", explainer="gradcam", model="tests.jobs.tiny:make_hostile"
    )
    audited(LocalStore(tmp_path / "out"), text=" ".join(HOSTILE))
    return tmp_path / "out"


def test_hostile_strings_are_text_and_nothing_else(hostile):
    body = page_at(hostile)
    page = Page(body)
    for text in HOSTILE:
        assert plain(text) in "".join(page.words)
    assert (page.tags.count("script"), page.tags.count("style"), page.tags.count("title")) == (1, 1, 1)
    assert [name for _, name, _ in page.attributes if name.startswith("on") or name in ("style", "autofocus")] == []
    assert set(page.tags) <= TAGS
    assert "49" not in page.values("data-text")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", body)


TAGS = set(
    """html head meta link title style script body header nav main section article h1 h2 h3 h4 p a ul ol li dl div dt dd
    span strong b bdi code button label select option input img svg rect line circle template table caption thead tbody
    tr th td details summary dialog""".split()  # noqa: SIM905 - a list of so many is no easier to read
)
"""All attributes that the template writes."""


def test_unprintable_names_are_kept_raw_for_the_search(hostile):
    page = Page(page_at(hostile))
    raw = [unquote(value) for value in page.values("data-raw")]
    assert all(value.isascii() and value.isprintable() for value in page.values("data-raw"))
    items = report_at(hostile).items
    wanted = [" ".join(item.words) for item in items]
    assert raw == [text for text in wanted if plain(text) != text]
    assert 0 < len(raw) < len(items)
    assert page.values("data-text") == [plain(text) for text in wanted]


def test_the_page_names_the_source_of_the_weights(output):
    facts = {fact.name: fact for fact in report_at(output).run}
    assert facts["model"].note == "weights: from the factory"
    plan = existing_plan(LocalStore(output))
    packaged = replace(plan, identity={**plan.identity, "model": "efficientnet_lite0"})
    named = replace(plan, identity={**plan.identity, "weights": "DEFAULT", "limit": 1})
    assert next(fact for fact in run_facts(packaged, {}, {}, None) if fact.name == "model").note == "weights: packaged"
    facts = {fact.name: fact for fact in run_facts(named, {}, {}, None)}
    assert (facts["model"].note, facts["limit"].value) == ("weights: DEFAULT", "1 record")


def test_nothing_is_asked_of_any_network(hostile):
    page = Page(page_at(hostile))
    for name in ("src", "href", "action", "data", "poster", "srcset", "formaction", "ping"):
        assert all(value.startswith(("data:", "#")) for value in page.values(name))
    assert "url(" not in page.blocks["style"]
    assert "@import" not in page.blocks["style"]
    assert not re.search(r"fetch|XMLHttp|import\(|innerHTML|eval|localStorage", page.blocks["script"])


def test_the_policy_allows_the_pages_own_blocks_alone(hostile):
    page = Page(page_at(hostile))
    policy = next(value for value in page.values("content") if "default-src" in value)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind, block in page.blocks.items():
        digest_of_block = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest_of_block}'"
    assert {name: rule for name, rule in rules.items() if name not in ("style-src", "script-src")} == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_commands_survive_a_quote_in_the_outputs_name(tmp_path):
    where = tmp_path / "it's"
    run_here(folder_of_images(tmp_path / "in", 2, bad=False), where, explainer="gradcam")
    command = report_at(where).commands[0].value
    shown = []
    fake = SimpleNamespace(sql=lambda text: SimpleNamespace(show=lambda: shown.append(_duckdb().sql(text).fetchall())))
    exec(command.replace("import duckdb; ", ""), {"duckdb": fake})
    assert sum(row[1] for row in shown[0]) == 2


def _duckdb():
    import duckdb

    return duckdb


# ---------------------------------------------------------------- the page in its place


def test_the_command_says_where_the_page_is_and_how_large(output):
    code, printed = called("report", output)
    assert code == 0, printed
    num_bytes = len((output / REPORT_KEY).read_bytes())
    assert f"report: {output}/{REPORT_KEY} ({num_bytes / 2**20:,.1f} MiB)" in printed
    assert blocksight("verify", output).returncode == 0


def test_a_place_that_holds_no_output_is_refused(tmp_path):
    code, printed = called("report", tmp_path)
    assert code == 2
    assert "there is no blocksight output" in printed


def test_the_page_is_rewritten_and_the_same_for_the_same_output(output):
    report = report_at(output)
    assert render(report) == render(report_at(output))
    page_at(output)
    page_at(output)
    assert [info.key for info in LocalStore(output).list("report/")] == [REPORT_KEY]


@pytest.mark.servers
def test_a_bucket_serves_the_page_as_html(bucket, tmp_path):
    where = f"{bucket.uri}/report-test"
    run_here(folder_of_images(tmp_path / "in", 3), where, explainer="gradcam", endpoint_url=bucket.endpoint_url)
    output = output_at(where, bucket.endpoint_url)
    written = write_report(output, bucket.endpoint_url, Console(quiet=True))
    assert written.uri == f"{where}/{REPORT_KEY}"
    assert len(output.store.read(REPORT_KEY)) == written.num_bytes
    found = output.store._call("head_object", Key=f"{where.removeprefix('s3://').split('/', 1)[1]}/{REPORT_KEY}")
    assert found["ContentType"] == "text/html; charset=utf-8"
