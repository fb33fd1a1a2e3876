"""Writes a data set on disk for FiftyOne: pictures, maps and one document per map."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from blocksight.jobs.export.parts import FormOfRecords, Part, place
from blocksight.jobs.export.pictures import as_jpeg, fitted_image
from blocksight.jobs.export.records import ExplainedMap, ExplainedRecord, ExplainedRecords, Row
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.worker.rows import Shown
from blocksight.storage.inputs.ground_truth import Truth

LAYOUT_VERSION = "1.0.0"
"""The FiftyOne version of these documents; later versions migrate them on reading."""
CREATED = {"$date": "2024-10-01T00:00:00Z"}
"""The creation time of every document; FiftyOne replaces it on reading."""
MAP_RANGE = [0, 255]
SAMPLES = "samples.json"
FIELDS = "fiftyone.core.fields"
OBJECTS = "ground_truth_objects"
"""The field of the ground truth's boxes."""

Document = dict[str, Any]
Tags = Mapping[tuple[str, int], Sequence[str]]
"""The audit's reasons why a map is odd, by key and target index."""


@dataclass(frozen=True)
class FiftyOne(FormOfRecords):
    """A data set on disk; the objects of `truth` become detections."""

    truth: Truth | None = None

    def write_records(self, records: Iterator[ExplainedRecord], reader: ExplainedRecords, folder: Path) -> None:
        """Writes pictures and maps by number, and a document per map, whose files are those numbers."""
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            for sample in _samples(records, reader, folder, _tags(reader), self.truth):
                file.write(json.dumps(sample) + "\n")

    def join(self, parts: Iterator[Part], reader: ExplainedRecords, folder: Path) -> Sequence[str]:
        """Writes the data set and returns the lines of Python that read it."""
        for name in ("data", "fields/heatmap"):
            (folder / name).mkdir(parents=True)
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            file.write('{"samples": [')
            for number, sample in enumerate(_joined(parts, folder)):
                file.write((",\n" if number else "\n") + json.dumps(sample))
            file.write("\n]}\n")
        metadata = _metadata(_Ids(reader.plan.fingerprint), reader)
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        return [
            "import fiftyone as fo",
            f"data = fo.Dataset.from_dir(dataset_dir={str(folder)!r}, dataset_type=fo.types.FiftyOneDataset)",
        ]


def _joined(parts: Iterator[Part], folder: Path) -> Iterator[Document]:
    """The documents of all parts, whose files get their places in the data set."""
    num_records = num_maps = 0
    for part in parts:
        with (part.folder / SAMPLES).open(encoding="utf-8") as lines:
            for line in islice(lines, part.num_maps):
                sample = json.loads(line)
                picture, saliency = sample["filepath"], sample["heatmap"]["map_path"]
                sample["filepath"] = f"data/{num_records + int(picture.removesuffix('.jpg')):08d}.jpg"
                sample["heatmap"]["map_path"] = (
                    f"fields/heatmap/{num_maps + int(saliency.removesuffix('.png')):08d}.png"
                )
                if not (folder / sample["filepath"]).exists():  # a record's targets share it
                    place(part.folder / picture, folder / sample["filepath"])
                place(part.folder / saliency, folder / sample["heatmap"]["map_path"])
                yield sample
        num_records, num_maps = num_records + part.num_records, num_maps + part.num_maps


def _tags(reader: ExplainedRecords) -> Tags:
    tags: dict[tuple[str, int], list[str]] = {}
    for odd in reader.audit.oddities if reader.audit is not None else ():
        tags.setdefault((odd.key, odd.target_index), []).append(odd.reason)
    return tags


class _Ids:
    """Document ids that depend on what they are of: the same for the same export, different for another one."""

    def __init__(self, *of: object) -> None:
        self.of, self.numbers = json.dumps([str(one) for one in of]), count()

    def digest(self) -> str:
        return hashlib.sha256(f"{self.of}/{next(self.numbers)}".encode()).hexdigest()

    def make(self) -> Document:
        return {"$oid": self.digest()[:24]}


def _samples(
    records: Iterator[ExplainedRecord], reader: ExplainedRecords, folder: Path, tags: Tags, truth: Truth | None
) -> Iterator[Document]:
    number = count()
    for place_of_record, record in enumerate(records):
        picture = f"{place_of_record}.jpg"
        image = fitted_image(reader.plan, record, record.maps[0].row, truth)
        (folder / picture).write_bytes(as_jpeg(image.pixels))
        for one in record.maps:
            map_of(one.row)  # raises for a damaged map before it is copied
            saliency = f"{next(number)}.png"
            (folder / saliency).write_bytes(one.row["map"])
            odd = tags.get((record.key, one.row["target_index"]), ())
            ids = _Ids(reader.plan.fingerprint, record.key, one.row["target"])
            yield {**_sample(record, one, picture, saliency, list(odd), ids), **_detections(image, ids)}


def _sample(
    record: ExplainedRecord, one: ExplainedMap, picture: str, saliency: str, tags: list[str], ids: _Ids
) -> Document:
    row, prediction = one.row, record.prediction
    labels = {
        "ground_truth": _label(row["label_name"], None, ids),
        "prediction": prediction and _label(prediction["target_name"], prediction["score"], ids),
        "target": _label(row["target_name"], row["score"], ids),
        "heatmap": {"_id": ids.make(), "_cls": "Heatmap", "tags": [], "map_path": saliency, "range": MAP_RANGE},
    }
    return {
        "_id": ids.make(),
        "filepath": picture,
        "tags": tags,
        "_media_type": "image",
        "_rand": int(ids.digest()[:12], 16) / 16**12,
        "created_at": CREATED,
        "last_modified_at": CREATED,
        **_plain(row),
        **{name: label for name, label in labels.items() if label is not None},
        **one.metrics,
    }


def _detections(image: Shown, ids: _Ids) -> Document:
    """The objects of the picture; nothing if it has none. Boxes are left, top, width and height as shares of it."""
    height, width = image.pixels.shape[:2]
    found = [
        {
            "_id": ids.make(),
            "_cls": "Detection",
            "attributes": {},
            "tags": [],
            "label": label or "object",
            "bounding_box": [left / width, top / height, (right - left) / width, (bottom - top) / height],
        }
        for label, (left, top, right, bottom) in image.boxes
    ]
    return {OBJECTS: {"_cls": "Detections", "detections": found}} if found else {}


def _label(name: str | None, score: float | None, ids: _Ids) -> Document | None:
    if name is None:
        return None
    label = {"_id": ids.make(), "_cls": "Classification", "tags": [], "label": name}
    return label if score is None else {**label, "confidence": score}


def _plain(row: Row) -> Document:
    return {name: row[name] for name in PLAIN if row[name] is not None}


PLAIN = {
    "key": "StringField",
    "explainer": "StringField",
    "target_index": "IntField",
    "target_rank": "IntField",
    "is_flat": "BooleanField",
    "is_saturated": "BooleanField",
}
"""Columns that become fields unchanged, with their FiftyOne types."""


def _metadata(ids: _Ids, records: ExplainedRecords) -> Document:
    """The document of the data set, which lists the fields of its samples."""
    name = f"blocksight-{records.plan.fingerprint[:8]}"
    metrics = {column: "FloatField" for column in records.columns.values()}
    fields = [
        _field("id", "ObjectIdField", db_field="_id"),
        _field("filepath", "StringField"),
        _field("tags", "ListField", subfield=f"{FIELDS}.StringField"),
        _image_metadata(),
        _field("_media_type", "StringField"),
        _field("_rand", "FloatField"),
        _field("_dataset_id", "ObjectIdField"),
        _field("created_at", "DateTimeField", read_only=True),
        _field("last_modified_at", "DateTimeField", read_only=True),
        *(_classification(field) for field in ("ground_truth", "prediction", "target")),
        _heatmap(),
        _detections_field(),
        *(_field(field, kind) for field, kind in {**PLAIN, **metrics}.items()),
    ]
    return {
        "_id": ids.make(),
        "name": name,
        "slug": name,
        "version": LAYOUT_VERSION,
        "created_at": CREATED,
        "last_modified_at": CREATED,
        "last_loaded_at": CREATED,
        "media_type": "image",
        "persistent": False,
        "tags": [],
        "info": {"output": records.store.uri, "job": records.plan.fingerprint},
        "app_config": {},
        "classes": {},
        "default_classes": [],
        "mask_targets": {},
        "default_mask_targets": {},
        "skeletons": {},
        "sample_fields": fields,
        "frame_fields": [],
        "saved_views": [],
        "workspaces": [],
        "annotation_runs": {},
        "brain_methods": {},
        "evaluations": {},
        "runs": {},
    }


def _image_metadata() -> Document:
    kinds = {"size_bytes": "IntField", "mime_type": "StringField"}
    kinds |= dict.fromkeys(("width", "height", "num_channels"), "IntField")
    return _document("metadata", "fiftyone.core.metadata.ImageMetadata", [_field(*kind) for kind in kinds.items()])


def _classification(name: str) -> Document:
    own = [_field("label", "StringField"), _field("confidence", "FloatField"), _field("logits", "VectorField")]
    return _document(name, "fiftyone.core.labels.Classification", [*_label_fields(), *own])


def _heatmap() -> Document:
    own = [
        _field("map", "ArrayField"),
        _field("map_path", "StringField"),
        _field("range", "HeatmapRangeField", subfield=f"{FIELDS}.FloatField"),
    ]
    return _document("heatmap", "fiftyone.core.labels.Heatmap", [*_label_fields(), *own])


def _detections_field() -> Document:
    own = [
        *_label_fields(),
        _field("attributes", "DictField"),
        _field("label", "StringField"),
        _field("bounding_box", "ListField", subfield=f"{FIELDS}.FloatField"),
        _field("confidence", "FloatField"),
        _field("index", "IntField"),
    ]
    listed = _field("detections", "ListField", subfield=f"{FIELDS}.EmbeddedDocumentField")
    listed |= {"embedded_doc_type": "fiftyone.core.labels.Detection", "fields": own}
    return _document(OBJECTS, "fiftyone.core.labels.Detections", [listed])


def _label_fields() -> list[Document]:
    return [
        _field("id", "ObjectIdField", db_field="_id"),
        _field("tags", "ListField", subfield=f"{FIELDS}.StringField"),
    ]


def _document(name: str, kind: str, fields: Sequence[Document]) -> Document:
    return {**_field(name, "EmbeddedDocumentField"), "embedded_doc_type": kind, "fields": fields}


def _field(
    name: str, kind: str, *, db_field: str | None = None, subfield: str | None = None, read_only: bool = False
) -> Document:
    return {
        "name": name,
        "ftype": f"{FIELDS}.{kind}",
        "embedded_doc_type": None,
        "subfield": subfield,
        "fields": [],
        "db_field": db_field or name,
        "description": None,
        "info": None,
        "read_only": read_only,
        "created_at": CREATED,
    }
