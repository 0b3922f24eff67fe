"""The chain behind a trained student: its run, its segments, and the versions that sampled them.

    student <- run <- segments by teacher and version <- versions that sampled <- base weights

It is read from logitcask.json, run.json and ledger.jsonl, and compared with the files themselves
and with the store. Every comparison is listed, and so is each that could not be made.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IdentityError, IntegrityError, LogitcaskError, ModelError
from logitcask.engine.models import identity
from logitcask.engine.models.digests import read_json
from logitcask.engine.models.weight_files import WEIGHTS
from logitcask.engine.packing.teachers import Source
from logitcask.engine.store import Segment, Store, open_store
from logitcask.engine.store.format.provenance import IMPORTED, SAMPLER
from logitcask.engine.training.provenance.ledger import read_lines, sources_of
from logitcask.engine.training.run_dir.checkpoints import LEDGER_SHA256
from logitcask.engine.training.run_dir.files import LEDGER, RESTORE, RUN, VERSIONS


@dataclass(kw_only=True, slots=True)
class Checks:
    """Lines on what was compared, and on what could not be."""

    verified: list[str] = field(default_factory=list)
    not_verified: list[str] = field(default_factory=list)


def trace(name: str, *, revision: str = "", url: str | None = None) -> dict[str, Any]:
    """Return the chain behind a student: a folder, or a Hub id, of which no weights are downloaded.

    url: the store of its segments; None = that of run.json, if it is still there. Raises ModelError
    for a folder without logitcask.json, IntegrityError for a damaged or missing file, and
    IdentityError for another store than that of the run.
    """
    return _student(identity.resolve_model(name, revision, weights=False), url, set())


def _student(path: Path, url: str | None, seen: set[Path]) -> dict[str, Any]:
    seen.add(path)
    metadata = identity.read_metadata(path)
    if metadata is None:
        raise ModelError(
            f"{path} has no {identity.METADATA_FILE}: nothing records how it was trained",
            hint="give the folder of a run, one of its versions, or the Hub id of a pushed student",
        )
    run_dir = path.parent.parent if path.parent.name == VERSIONS else path
    run = read_json(run_dir / RUN, hint=RESTORE) if (run_dir / RUN).exists() else {}
    checks = Checks()
    _check_weights(path, metadata, checks)
    lines = _ledger(path, run_dir, metadata, run, checks)
    found = usage(lines, metadata["version"] - (lines[-1]["update"] if lines else 0))
    where = url or ((run.get("config") or {}).get("store") or {}).get("url")
    store = metadata.get("store", run.get("store"))
    checked = _open(where, store, url is not None, checks)
    segments = _segments(checked, metadata.get("pin"), lines, checks) if checked else {}
    return {
        "folder": str(path),
        **{key: metadata[key] for key in ("version", "parent")},
        "weights": metadata.get("weights"),
        "base_weights": metadata["root"],
        "run": {
            "objective": metadata.get("preset") or run.get("preset") or metadata["objective"],
            "updates": lines[-1]["update"] if lines else None,
            "settings": metadata.get("settings"),
            "plan": metadata["plan"],
        },
        "store": {"uuid": store, "url": where, "snapshot": metadata.get("pin")},
        "ledger": totals(lines),
        "teachers": [_named(group, segments) for group in found],
        "verified": checks.verified,
        "not_verified": checks.not_verified,
        "trained_from": _parent(metadata, run, seen),
    }


def totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows, ages and drift over all lines of a ledger; a mean is over rows."""
    rows = [sum(line["rows"].values()) for line in lines]
    aged = [(line["age"], n) for line, n in zip(lines, rows, strict=True) if "age" in line]
    drifts = [(line["drift"], n) for line, n in zip(lines, rows, strict=True) if "drift" in line]
    pairs = zip(lines, rows, strict=True)
    moving = [(line["teacher_age"], n) for line, n in pairs if "teacher_age" in line]
    return {
        "segments": len({source.rollouts for source in sources_of(lines)}),
        "rows": sum(rows),
        "age": _span(aged),
        **({"teacher_age": _span(moving)} if moving else {}),
        "drift": _mean(drifts),
        "largest_drift": max((drift for drift, _ in drifts), default=None),
    }


def usage(lines: Sequence[Mapping[str, Any]], start: int) -> list[dict[str, Any]]:
    """Return segments, rows, ages and drift of each (teacher, version that sampled).

    start: version of the student before update 0. The drift of an update counts for all its rows.
    """
    sources = list(sources_of(lines))
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        for number, rows in line["rows"].items():
            source = sources[int(number)]
            group = groups.setdefault(
                (source.teacher, source.version),
                {"sources": set(), "rows": 0, "ages": [], "teacher_ages": [], "drifts": []},
            )
            group["sources"].add(source)
            group["rows"] += rows
            if "age" in line:
                age = start + line["update"] - 1 - source.version
                group["ages"].append(([age] * 3, rows))
            if source.teacher_version is not None:
                age = start + line["update"] - 1 - source.teacher_version
                group["teacher_ages"].append(([age] * 3, rows))
            if "drift" in line:
                group["drifts"].append((line["drift"], rows))
    return [
        {
            "teacher": teacher,
            "version": version,
            "sources": sorted(group["sources"]),
            "rows": group["rows"],
            "age": _span(group["ages"]),
            **({"teacher_age": of} if (of := _span(group["teacher_ages"])) else {}),
            "drift": _mean(group["drifts"]),
        }
        for (teacher, version), group in sorted(groups.items())
    ]


def _span(aged: Sequence[tuple[Sequence[float], int]]) -> list[float] | None:
    """Return [least, mean, largest] of such triples, the mean over rows; None without any."""
    if not aged:
        return None
    mean = _mean([(age[1], rows) for age, rows in aged])
    return [min(a[0] for a, _ in aged), mean or 0.0, max(a[2] for a, _ in aged)]


def _mean(values: Sequence[tuple[float, int]]) -> float | None:
    total = sum(rows for _, rows in values)
    return sum(value * rows for value, rows in values) / total if total else None


def _check_weights(path: Path, metadata: Mapping[str, Any], checks: Checks) -> None:
    if "weights" not in metadata:
        checks.not_verified.append("weights: an earlier version recorded no digest of them")
    elif not any(path.glob(WEIGHTS)):
        checks.not_verified.append("weights: they are not on this machine")
    elif identity.weights_digest(path) != metadata["weights"]:
        raise IntegrityError(
            f"{path} holds other weights than {identity.METADATA_FILE} describes",
            hint="restore the weights from a copy",
        )
    else:
        checks.verified.append("weights: sha256 as recorded")


def _ledger(
    path: Path,
    run_dir: Path,
    metadata: Mapping[str, Any],
    run: Mapping[str, Any],
    checks: Checks,
) -> list[dict[str, Any]]:
    """Return the lines of the ledger up to this student, with its digest compared."""
    file = run_dir / LEDGER
    expected = metadata.get("ledger") if path == run_dir else run.get(LEDGER_SHA256)
    if not file.is_file():
        if expected:
            raise IntegrityError(f"{file} is missing", hint=RESTORE)
        checks.not_verified.append("ledger: this run recorded none")
        return []
    data = file.read_bytes()
    if not expected:
        checks.not_verified.append("ledger: the run is not finished, so it has no digest yet")
    elif "sha256:" + hashlib.sha256(data).hexdigest() != expected:
        raise IntegrityError(f"{file} holds other lines than were written", hint=RESTORE)
    else:
        checks.verified.append("ledger: sha256 as recorded")
    # A process may be writing its last line.
    whole = data[: data.rfind(b"\n") + 1]
    lines = read_lines(file, whole.decode(errors="replace"))
    if path != run_dir:
        updates = metadata["version"] - int((run.get("student") or {}).get("version", 0))
        lines = [line for line in lines if line["update"] <= updates]
    have = {line["update"] for line in lines}
    if lines and (lost := lines[-1]["update"] - len(have)):
        checks.not_verified.append(f"ledger: {lost} updates have no line, from an earlier version")
    return lines


def _open(url: str | None, uuid: str | None, required: bool, checks: Checks) -> Store | None:
    """Open the store of the segments; None where it cannot be compared, unless it is required."""
    if not url or not uuid:
        checks.not_verified.append("store: the folder does not name it; give --store URL")
        return None
    try:
        store = open_store(url)
    except LogitcaskError as error:
        if required:
            raise
        checks.not_verified.append(f"store: {error.cause}; give --store URL")
        return None
    if store.uuid != uuid:
        raise IdentityError(
            f"{store.url} is the store {store.uuid}, and the student was trained from {uuid}",
            hint="give the store of the run with --store",
        )
    checks.verified.append("store: the uuid of the run")
    return store


def _segments(
    store: Store, pin: Any, lines: Sequence[Mapping[str, Any]], checks: Checks
) -> dict[str, Segment]:
    """Return seg_id -> segment of the store, at the run's snapshot if it had one."""
    snapshot = store.snapshot(pin["number"], pin["sha256"]) if pin else store.head()
    if pin:
        checks.verified.append(f"snapshot: log record {pin['number']} has the sha256 of the run")
    known = {segment.seg_id: segment for segment in snapshot.segments}
    names = {i for s in sources_of(lines) for i in (s.rollouts, *s.scores, *s.base)}
    if lost := len(names - known.keys()):
        checks.not_verified.append(f"segments: {lost} of {len(names)} are no longer in the store")
    if here := len(names & known.keys()):
        checks.verified.append(f"segments: {here} are in the log of the store")
    return known


def _named(group: dict[str, Any], segments: Mapping[str, Segment]) -> dict[str, Any]:
    """Return a group with the models of its segments, where the store has them."""
    sources: list[Source] = group.pop("sources")
    teachers = _models(segments, [s.scores[0] for s in sources], "teacher")
    students = _models(segments, [s.rollouts for s in sources], "student")
    return {
        **group,
        "segments": len({source.rollouts for source in sources}),
        "models": teachers,
        "sampled_by": students,
    }


def _models(
    segments: Mapping[str, Segment], names: Sequence[str], key: str
) -> list[dict[str, Any]]:
    """Return the distinct models that these segments record."""
    found = []
    for name in names:
        record = None
        if name in segments:
            provenance = segments[name].provenance
            imported = provenance.get(IMPORTED, {})
            # The student has scored imported rollouts; another model sampled them.
            known = key == "student" and SAMPLER in imported
            record = imported[SAMPLER] if known else provenance.get(key)
        if isinstance(record, Mapping):
            model = {k: record.get(k) for k in ("name", "revision", "version", "weights")}
            if model not in found:
                found.append(model)
    return found


def _parent(metadata: Mapping[str, Any], run: Mapping[str, Any], seen: set[Path]) -> dict[str, Any]:
    """Return the student before update 0: its own chain where its folder is found, else its digest.

    It is looked for at its place in run.json, and believed by its recorded digest.
    """
    name = ((run.get("config") or {}).get("student") or {}).get("model") or ""
    node: dict[str, Any] = {"weights": metadata["parent"], "name": name}
    if metadata["parent"] == metadata["root"]:
        return {**node, "version": 0}
    folder = identity.local_folder(name) if name else None
    if folder is None or folder in seen:
        return node
    theirs = identity.read_metadata(folder)
    if theirs is None or theirs.get("weights") != metadata["parent"]:
        return {**node, "note": f"{folder} now holds another model"}
    return {"name": name, **_student(folder, None, seen)}
