"""The facts that a report lists: the run, its cost, its provenance, and commands to go on with."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from blocksight.engine.catalog.composition import parse_method
from blocksight.engine.catalog.entries import EXPLAINERS, MODELS, RECONSTRUCTED
from blocksight.jobs.evaluate.compare import Output
from blocksight.jobs.ledger.output import model_facts
from blocksight.jobs.ledger.reconcile import JobState
from blocksight.jobs.ledger.stop_request import RUNS_FOLDER
from blocksight.jobs.plan.documents import read_document
from blocksight.jobs.plan.forward_setting import PlannedForward
from blocksight.jobs.plan.model_input import fed_text
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.preflight import Preflight
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.text import counted
from blocksight.storage.stores.store import MissingError, ObjectStore

MAX_RUNS = 10
RUN_FACTS = ("started", "workers", "device", "python", "packages")
"""Facts of a run that the page shows. Its host, address and process are not shown."""
NO_QUALITY = "this metric chose them, so that it says nothing about their quality and is not reported"


@dataclass(frozen=True)
class Fact:
    """A name, its value and a note."""

    name: str
    value: str
    note: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class Share:
    """A count as a part of a whole."""

    name: str
    count: int
    share: float
    """0 to 1."""
    note: str = ""


def run_facts(
    plan: Plan,
    model: Mapping[str, Any],
    selected_by: Mapping[str, int],
    forward: PlannedForward | None,
    preflight: Preflight | None = None,
    labels: str | None = None,
) -> Iterator[Fact]:
    """Facts of what was run. `selected_by`: number of maps by the metric that chose them among several.

    `labels`: how the data's labels were read.
    """
    identity = plan.identity
    yield Fact(
        "data", identity["data"], f"{counted(plan.num_objects, 'object')}, {size(plan.num_bytes)}, as {plan.layout}"
    )
    made = "packaged" if identity["model"] in MODELS else "from the factory"
    weights = identity["weights"] or made
    yield Fact("model", identity["model"], f"weights: {weights}")
    if model:
        yield Fact(
            "input",
            fed_text(model["input_size"], model["mean"], model["std"]),
            f"{_resize(identity['resize'])}; {counted(model['num_classes'], 'class')}",
        )
        places = ", ".join(
            f"{own['name']} ({own['channels']} at {own['height']} x {own['width']})" for own in model["blocks"]
        )
        for note in model["notes"]:
            yield Fact("weights", note)
        if places:
            yield Fact("blocks", places, "feature maps that the explainer looks at")
    if labels is not None:
        yield Fact("labels", labels)
    if preflight is not None:
        yield Fact("model check", str(preflight), "; ".join(preflight.findings))
    yield Fact("explainer", identity["explainer"], f"fidelity {identity['fidelity']}, preset {identity['preset']}")
    if forward is not None:
        error = "not recorded" if forward.score_error is None else f"{forward.score_error:.2g}"
        yield Fact("masks scored by", str(forward.setting), f"chosen by {forward.chosen}; median score error {error}")
    reconstructed = [name for name in parse_method(identity["explainer"]).names if EXPLAINERS[name].is_reconstruction]
    if reconstructed:
        yield Fact("origin", f"{', '.join(reconstructed)}: {RECONSTRUCTED}")
    yield Fact("parameters", ", ".join(_parameters(identity["parameters"])) or "none")
    for metric, count in sorted(selected_by.items()):
        yield Fact("picked by", metric, f"{counted(count, 'map')} among several each: {NO_QUALITY}")
    yield Fact("target", identity["target"], "the class whose score is explained")
    yield Fact("seed", str(identity["seed"]), "of everything random")
    if identity["limit"] is not None:
        yield Fact("limit", counted(identity["limit"], "record"), "only the first of the data set")


def _parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`mu = 0.3` for each parameter; `base.mu = 0.3` for one of a wrapped explainer."""
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _parameters(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} = {value}"


def _resize(how: str) -> str:
    """What a reader is told of how pictures are fitted."""
    kind, _, rest = how.partition(", ")
    plain = {"squash": "the whole image is squashed to it", "crop": "the image's centre is cropped to it"}
    return f"{plain[kind]}{', ' if rest else ''}{rest}" if kind in plain else how


def size(num_bytes: float) -> str:
    """`1.2 MiB`."""
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**19 else f"{num_bytes / 2**10:,.1f} KiB"


def duration(seconds: float) -> str:
    """`0.12 s`, `6.0 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def cost_facts(job_state: JobState, workers: Counter[str]) -> Iterator[Fact]:
    """Facts of what the maps cost. `workers`: the runs' workers, as of `workers_of`."""
    timed = [receipt for receipt in job_state.receipts.values() if receipt.explain_seconds]  # a rebuilt one is not
    seconds = sum(receipt.explain_seconds or 0.0 for receipt in timed)
    forwards, num_ok = job_state.total("num_forwards"), job_state.total("num_ok")
    each = f"{forwards / num_ok:,.0f} a record" if forwards and num_ok else ""
    if forwards:
        yield Fact("masked forwards", f"{forwards:,}", each)
    if seconds:
        records = sum(receipt.num_records for receipt in timed)
        yield Fact("worker time", duration(seconds), f"over {counted(records, 'record')}, all workers together")
        note = f"of one worker; {duration(seconds / records)} a record"
        yield Fact("throughput", f"{records / seconds:,.3g} records/s", note)
        rate = sum(receipt.num_forwards for receipt in timed) / seconds
        if rate:
            yield Fact("masked forwards/s", f"{rate:,.0f}", "of one worker")
    for text, count in workers.most_common():
        yield Fact("workers", text, f"in {counted(count, 'run')}, as the run wrote them down when it began")
    ways = Counter(receipt.forward for receipt in timed if receipt.forward)
    for way, count in ways.most_common():
        yield Fact("forward pass", way, counted(count, "unit"))
    num_bytes, num_rows = job_state.total("num_bytes"), job_state.total("num_rows")
    each = f"{size(num_bytes / num_rows)} a row" if num_rows else ""
    yield Fact("output", size(num_bytes), each)


def model_of(store: ObjectStore) -> Mapping[str, Any]:
    """The stored facts of the model; empty before it was first loaded."""
    try:
        return model_facts(store)
    except MissingError:
        return {}


def provenance_facts(job_state: JobState, model: Mapping[str, Any]) -> Iterator[Fact]:
    identity = job_state.plan.identity
    yield Fact("plan fingerprint", job_state.plan.fingerprint, "hash of all that changes the result", is_code=True)
    if model:
        yield Fact("weights sha256", model["weights_sha256"], "over all weights and buffers", is_code=True)
    hashes = [receipt.sha256 for receipt in sorted(job_state.receipts.values(), key=lambda own: own.ordinal)]
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    meaning = f"sha256 over the sha256 of {counted(len(hashes), 'fragment')}, in the plan's order"
    yield Fact("fragments", digest, meaning, is_code=True)
    yield Fact("code version", str(identity["code"]), "raised whenever the same input would give other bytes")
    yield Fact("schema version", str(identity["schema"]), f"map codec {identity['codec']}")


class RunDocument(TypedDict):
    """The content of a run's `run.json`."""

    started: str
    host: str
    python: str
    packages: dict[str, str]
    execution: dict[str, Any]
    sizing: dict[str, Any] | None
    batch_size: int | None
    device: str


def runs_of(store: ObjectStore) -> Iterator[tuple[Fact, ...]]:
    """Yields `RUN_FACTS` of the latest runs, newest first."""
    for run in _run_documents(store):
        packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
        texts = {**run, "packages": packages, "workers": _workers(run)}
        yield tuple(Fact(name, texts[name]) for name in RUN_FACTS)


def workers_of(store: ObjectStore) -> Counter[str]:
    """The workers that explained, in words, with the number of the latest runs that had them."""
    return Counter(map(_workers, _run_documents(store)))


def _run_documents(store: ObjectStore) -> Iterator[RunDocument]:
    """Yields what the latest runs wrote when they began, newest first; a damaged document is left out."""
    keys = sorted((info.key for info in store.list(RUNS_FOLDER) if info.key.endswith("/run.json")), reverse=True)
    for key in keys[:MAX_RUNS]:
        with suppress(UnreconciledError, MissingError):  # the document is for information only
            yield read_document(store, key, RunDocument)


def _workers(run: RunDocument) -> str:
    """`2 explain actors with 1 CPU thread each`."""
    sizing = run["sizing"]
    if sizing is None:
        return "the command's own process"
    if not {"num_actors", "threads_per_actor", "gpus_per_actor"} <= sizing.keys():
        return "not recorded"
    gpu = " and a GPU" if sizing["gpus_per_actor"] else ""
    threads = counted(sizing["threads_per_actor"], "CPU thread")
    return f"{counted(sizing['num_actors'], 'explain actor')} with {threads}{gpu} each"


def commands(output: Output, *, has_audit: bool, has_values: bool) -> Iterator[Fact]:
    name, uri = shlex.quote(output.name), output.store.uri
    where = _sql_text(f"{uri}/data/**/*.parquet")
    yield Fact(
        "classes by Drop, in Python with DuckDB",
        _duckdb(
            f"SELECT target_name, count(*) AS maps, avg(score) AS score, avg(metrics.drop) AS mean_drop FROM {where} "
            "WHERE status = 'ok' GROUP BY ALL ORDER BY mean_drop DESC"
        ),
    )
    if has_audit:
        rows = _sql_text(f"{uri}/audit/rows/*.parquet")
        yield Fact(
            "the oddest maps, likewise",
            _duckdb(f"SELECT key, target_name, score, strangeness FROM {rows} ORDER BY strangeness DESC LIMIT 20"),
        )
    yield Fact("one record, as a picture", f"blocksight show {name} KEY")
    if not has_values:
        yield Fact("more metrics", f"blocksight evaluate {name} --controls")
    if not has_audit:
        yield Fact("shortcuts, groups, oddities", audit_command(name))


def _sql_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _duckdb(sql: str) -> str:
    return f"import duckdb; duckdb.sql({sql!r}).show()"


def audit_command(name: str) -> str:
    """The command that makes an audit; `name` is quoted for a shell."""
    return f"blocksight audit {name}"
