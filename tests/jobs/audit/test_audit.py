"""Whole audits: a planted shortcut is found and proved, clean data have none, and the units do not matter."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from blocksight.jobs.audit.result import AUDIT_KEY, Audit, read_audit
from blocksight.jobs.audit.run import AuditRequest, run_audit
from blocksight.jobs.cli.app import FINDING
from blocksight.jobs.cli.audit_tables import audit_table
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.storage.stores.local import LocalStore
from tests.engine import planted
from tests.jobs import tiny
from tests.jobs.jobs_of import blocksight, called, model_of, rows_in, run_here
from tests.jobs.marked import CLASS_NAMES, CLEAN_MODELS, MARK_BOX, MARKED, MODEL, write
from tests.jobs.tiny import folder_of_images


def audited(output: Path, **asked: object) -> Audit:
    return run_audit(AuditRequest(str(output), **{"model": model_of(output), **asked}), Console(quiet=True))


def explained(folder: Path, output: Path, model: str, explainer: str = "gradcam") -> Path:
    torch.set_num_threads(1)
    run_here(folder, output, model=model, explainer=explainer)
    return output


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maps of a model that has learned to look at a mark."""
    root = tmp_path_factory.mktemp("marked")
    write(root / "in", 200, seed=50_000, marked=True)
    return explained(root / "in", root / "out", MODEL)


@pytest.fixture(scope="module")
def found(marked: Path) -> Audit:
    """An audit of these maps, with a trial."""
    return audited(marked)


@pytest.fixture(scope="module")
def in_many_units(marked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same maps in units of a few records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.05)
        return explained(marked.parent / "in", tmp_path_factory.mktemp("many") / "out", MODEL)


def boxes_of_objects(folder: Path, box: tuple[int, int, int, int], file: Path) -> str:
    """COCO annotations: every picture has one object, of its class, in the same box."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    left, top, right, bottom = box
    shape = [left, top, right - left, bottom - top]
    coco = {
        "images": [{"id": index, "file_name": name} for index, name in enumerate(names)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": CLASS_NAMES.index(name.split("/")[0]), "bbox": shape, "iscrowd": 0}
            for n, name in enumerate(names)
        ],
    }
    file.write_text(json.dumps(coco))
    return str(file)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The share of `other` that lies in `one`."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height) / ((other[2] - other[0]) * (other[3] - other[1]))


def console_text(found: Audit) -> str:
    """What the command prints of an audit."""
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(audit_table(found, "here"), soft_wrap=True)
    return console.export_text()


def test_the_planted_shortcut_is_the_one_finding(found: Audit) -> None:
    [finding] = found.findings
    assert finding.target_index == MARKED
    assert overlap(finding.box, MARK_BOX) > 0.9
    assert finding.share > 0.8
    assert finding.blanked is not None
    assert finding.pasted is not None
    assert min(finding.blanked.mean, finding.pasted.mean) > 2
    assert (finding.pasted.probability or 0) > 0.5
    assert finding.on_object is None
    assert all(key.startswith(CLASS_NAMES[MARKED]) for key in finding.members)
    assert (found.num_rows, found.num_maps, found.num_rejected) == (200, 200, 0)
    assert found.num_right is not None
    assert found.num_right > 180


@pytest.mark.sweep
def test_a_model_that_learns_from_the_mark_anew_has_the_one_finding(tmp_path: Path) -> None:
    write(tmp_path / "in", 200, seed=50_000, marked=True)
    [finding] = audited(explained(tmp_path / "in", tmp_path / "out", f"{MODEL}_anew")).findings
    assert finding.target_index == MARKED


@pytest.mark.parametrize(
    "model", [CLEAN_MODELS[0], *(pytest.param(name, marks=pytest.mark.sweep) for name in CLEAN_MODELS[1:])]
)
def test_clean_data_have_no_finding(model: str, tmp_path: Path) -> None:
    write(tmp_path / "in", 200, seed=60_000 + CLEAN_MODELS.index(model), marked=False)
    output = explained(tmp_path / "in", tmp_path / "out", model)
    assert audited(output).findings == ()


def test_a_mark_that_the_model_never_saw_is_no_finding(tmp_path: Path) -> None:
    write(tmp_path / "in", 200, seed=50_000, marked=True)
    output = explained(tmp_path / "in", tmp_path / "out", CLEAN_MODELS[0])
    assert audited(output).findings == ()


def test_ground_truth_tells_shortcuts_from_objects(marked: Path, tmp_path: Path) -> None:
    folder = marked.parent / "in"
    apart = boxes_of_objects(folder, (8, 8, 28, 28), tmp_path / "apart.json")
    [finding] = audited(marked, truth=apart).findings
    assert finding.on_object == 0
    same = boxes_of_objects(folder, (44, 44, 64, 64), tmp_path / "same.json")
    found = audited(marked, truth=same)
    assert found.findings == ()
    assert "it may be the object" in found.suspicions[0].why
    rows = pq.read_table(marked / "audit" / "rows").to_pylist()
    for row in rows:
        assert row["on_object"] + row["on_context"] + row["elsewhere"] == pytest.approx(1, abs=1e-5)
    own = [row["on_object"] for row in rows if row["target_index"] == MARKED]
    others = [row["on_object"] for row in rows if row["target_index"] != MARKED]
    assert np.mean(own) > 0.4 > np.mean(others)


def test_without_a_trial_nothing_is_a_finding_and_no_model_is_needed(
    marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blocksight.jobs.audit.run.model_of_output", None)
    found = audited(marked, tries=False)
    assert found.findings == ()
    assert found.suspicions[0].target_index == MARKED
    assert "not put to the test" in found.suspicions[0].why


def test_an_audit_reads_back_as_it_was_and_replaces_the_last(marked: Path) -> None:
    old_rows = marked / "audit" / "rows" / "old.parquet"
    old_rows.parent.mkdir(parents=True, exist_ok=True)
    old_rows.write_bytes(b"of another audit")
    made = audited(marked)
    read = read_audit(LocalStore(marked))
    assert read is not None
    assert not old_rows.exists()
    plain = ("fragments", "num_maps", "gates", "oddities", "shortcuts", "notes", "num_right")
    assert [getattr(read, name) for name in plain] == [getattr(made, name) for name in plain]
    for ours, theirs in zip(made.groups, read.groups, strict=True):
        assert (ours.kind, ours.label, ours.predicted, ours.count) == (
            theirs.kind,
            theirs.label,
            theirs.predicted,
            theirs.count,
        )
        assert ours.spreads == theirs.spreads
        assert np.array_equal(ours.mean_map, theirs.mean_map)
    assert [vars(one).keys() for one in made.clusters] == [vars(one).keys() for one in read.clusters]


def test_a_damaged_audit_is_named(marked: Path) -> None:
    audited(marked, tries=False)
    for name in ("groups.parquet", "audit.json"):
        (marked / "audit" / name).write_bytes(b"{")
        with pytest.raises(UnreconciledError, match="is damaged, `blocksight audit` makes it again"):
            read_audit(LocalStore(marked))
    audited(marked, tries=False)
    (marked / "audit" / "clusters.parquet").unlink()
    with pytest.raises(UnreconciledError, match="is damaged, `blocksight audit` makes it again"):
        read_audit(LocalStore(marked))


def test_every_map_has_one_row(marked: Path) -> None:
    found = audited(marked, tries=False)
    rows = pq.read_table(marked / "audit" / "rows").to_pylist()
    explained_rows = rows_in(LocalStore(marked))
    assert [row["key"] for row in rows] == [row["key"] for row in explained_rows]
    counts = {group.predicted: group.count for group in found.groups if group.kind == "predicted"}
    assert sum(counts.values()) == 200
    assert sum(row["strangeness"] is not None for row in rows) == 200


def test_the_cut_into_units_changes_nothing(marked: Path, found: Audit, in_many_units: Path) -> None:
    assert len(list((in_many_units / "data").rglob("*.parquet"))) > len(list((marked / "data").rglob("*.parquet")))
    one, other = found, audited(in_many_units)
    assert one.shortcuts == other.shortcuts
    assert one.oddities == other.oddities
    assert [vars(group).keys() for group in one.groups] == [vars(group).keys() for group in other.groups]
    assert [(g.count, g.spreads) for g in one.groups] == [(g.count, g.spreads) for g in other.groups]


def test_further_targets_change_no_finding(marked: Path, found: Audit, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run_here(marked.parent / "in", tmp_path / "out", model=MODEL, explainer="gradcam", target="top-2")
    of_two = audited(tmp_path / "out")
    [finding] = of_two.findings
    [alone] = found.findings
    assert (finding.box, finding.blanked, finding.pasted) == (alone.box, alone.blanked, alone.pasted)
    assert (of_two.num_maps, of_two.num_right) == (400, 200)
    assert sum(group.count for group in of_two.groups if group.kind == "class") == 200


def test_an_unfinished_output_says_so_and_a_damaged_one_is_refused(in_many_units: Path, tmp_path: Path) -> None:
    output = copytree(in_many_units, tmp_path / "out")
    first, second, *_ = sorted((output / "data").rglob("*.parquet"), key=lambda file: file.name)
    first.unlink()
    found = audited(output, tries=False)
    assert found.num_rows < 200
    assert "1 unit of" in found.notes[0]
    second.write_bytes(second.read_bytes()[:500])
    with pytest.raises(UnreconciledError, match=second.name):
        audited(output, tries=False)


def test_a_wrong_request_is_refused_before_any_work(marked: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no blocksight output"):
        audited(tmp_path)
    with pytest.raises(ConfigError, match="give both"):
        audited(marked, class_map=tmp_path / "map.json")


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    other = tiny.make_other()
    monkeypatch.setattr(tiny, "make", lambda: other)
    with pytest.raises(ConfigError, match=r"(?s)weights_sha256.*--no-try"):
        audited(tmp_path / "out")
    assert not (tmp_path / "out" / AUDIT_KEY).exists()


def test_the_finding_is_printed_in_words(found: Audit) -> None:
    assert "FINDING: disc looks at the region" in console_text(found)


def test_the_command_audits_and_prints_the_suspicion(marked: Path) -> None:
    made = blocksight("audit", marked, "--no-try")
    assert made.returncode == 0, made.stderr
    assert "suspicion: disc looks at the region" in made.stdout
    assert "not put to the test" in made.stdout
    assert f"blocksight report {marked}" in made.stdout


def test_a_finding_says_where_it_was_tried_and_suspicions_come_after(found: Audit) -> None:
    [finding] = found.findings
    assert CLASS_NAMES[MARKED] not in finding.other_classes
    assert set(finding.other_classes) <= set(CLASS_NAMES)
    assert finding.blanked is not None
    printed = console_text(found)
    assert f"inpainted in {finding.blanked.count} records of disc" in printed
    assert "Nothing is claimed of other records, classes or regions." in printed
    assert [one.standing for one in found.shortcuts] == sorted(
        (one.standing for one in found.shortcuts), key=["finding", "suspicion", "not confirmed"].index
    )


def test_what_was_tried_without_effect_is_one_line(found: Audit) -> None:
    none = replace(found.findings[0], blanked=replace(found.findings[0].blanked, p_value=0.5), is_confirmed=False)
    printed = console_text(replace(found, shortcuts=(none, none)))
    assert "suspicion:" not in printed
    assert "tested, not confirmed: 2 regions of disc; audit.json has the figures" in printed


def test_an_audit_can_fail_a_pipeline(marked: Path) -> None:
    made = blocksight("audit", marked, "--fail-on", "finding", "--model", MODEL)
    assert made.returncode == FINDING == 7, made.stderr
    assert "FINDING: disc" in made.stdout
    assert read_audit(LocalStore(marked)) is not None
    assert blocksight("audit", marked, "--model", MODEL).returncode == 0
    refused = blocksight("audit", marked, "--fail-on", "finding", "--no-try")
    assert refused.returncode == 2
    assert "give one of them" in refused.stderr


def test_an_output_of_one_class_and_rejects_is_audited_all_the_same(tmp_path: Path) -> None:
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", explainer="gradcam", target="1")
    found = audited(tmp_path / "out")
    assert found.num_rejected > 0
    assert "explain one class alone" in " ".join(found.notes)


def test_what_a_small_output_costs_and_lacks_is_said_in_its_own_figures(tmp_path: Path) -> None:
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    code, printed = called("audit", tmp_path / "out", "--model", model_of(tmp_path / "out"))
    assert code == 0
    images, passes = len(rows_in(LocalStore(tmp_path / "out"))), 6  # as it is, changed, and with four random regions
    assert f"tries at most 40 regions on the model: at most {40 * images * passes:,} forwards" in printed
    assert re.search(r"no clusters are looked for in (\d) of \1 class(es)?: fewer than 30 maps each", printed)


# ---------------------------------------------------------------- targets that are no class


@pytest.fixture(scope="module")
def of_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs in one of three places, explained against a cross, against the label, and by a feature."""
    root = tmp_path_factory.mktemp("sums")
    corners = torch.tensor([[0, 0], [44, 44], [0, 44]])[torch.arange(90) % 3]
    pixels = planted.draw(torch.full((90, 1), 3), corners[:, None], planted.generator(7))
    (root / "in/disc").mkdir(parents=True)
    for number, own in enumerate(pixels):
        Image.fromarray(own.permute(1, 2, 0).numpy()).save(root / f"in/disc/{number:03}.png")
    torch.set_num_threads(1)
    model = "tests.engine.planted:trained_cnn"
    run_here(root / "in", root / "out", model=model, explainer="gradcam", target="3-4,margin,predicted,logit(3)-label")
    return root / "out"


def test_maps_of_sums_are_clustered_by_their_target(of_sums: Path) -> None:
    found = audited(of_sums, tries=False)
    own = {one.join_key: [] for one in found.clusters}
    for one in found.clusters:
        own[one.join_key].append(one)
    assert [sum(one.count for one in own[target]) > 60 for target in ("3-4", "margin", "3")] == [True] * 3
    assert all(one.target_index is None for target in ("3-4", "margin") for one in own[target])
    places = [{int(Path(key).stem) % 3 for key in one.examples} for one in own["3-4"]]
    assert [len(one) for one in places] == [1] * len(places)
    assert set().union(*places) == {0, 1, 2}
    assert read_audit(LocalStore(of_sums)) is not None
    rows = pq.read_table(of_sums / "audit/rows").to_pylist()
    assert len({(row["key"], row["target"]) for row in rows}) == len(rows) == 4 * 90
    assert all(row["cluster"] is None for row in rows if row["is_flat"])
    assert not any(one.target_index is None for one in found.oddities)


@pytest.mark.parametrize("command", [("report",), ("sql", "SELECT target, count(*) FROM audit_clusters GROUP BY ALL")])
def test_clusters_of_sums_are_shown(command: tuple[str, ...], of_sums: Path) -> None:
    audited(of_sums, tries=False)
    name, *more = command
    code, text = called(name, of_sums, *more)
    assert code == 0, text
    shown = next((of_sums / "report").glob("*.html")).read_text() if name == "report" else text
    assert "3-4" in shown


def test_an_audit_of_an_older_version_is_read(of_sums: Path, tmp_path: Path) -> None:
    output = copytree(of_sums, tmp_path / "out")
    wanted = audited(output, tries=False)
    of_classes = tuple(one for one in wanted.clusters if one.target_index is not None)
    for file in (*(output / "audit/rows").iterdir(), output / "audit/clusters.parquet"):
        table = pq.read_table(file)
        is_class = table["target_index"].is_valid()
        pq.write_table(table.filter(is_class).drop_columns(["target"]), file)
    found = read_audit(LocalStore(output))
    assert found is not None
    assert [(one.target_index, one.join_key, one.count) for one in found.clusters] == [
        (one.target_index, one.join_key, one.count) for one in of_classes
    ]
    code, text = called("sql", output, "SELECT DISTINCT target FROM audit_rows")
    assert (code, "3" in text) == (0, True), text
