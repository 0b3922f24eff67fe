"""Section of what was run: models, objective, requests, settings, and the digests of all of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logitcask.engine.config.section import Section as ConfigSection
from logitcask.engine.config.sections import RunConfig, TrainConfig
from logitcask.engine.errors import ObjectiveError, StoreError
from logitcask.engine.objectives import Preset, parse_objective
from logitcask.engine.report.panels import Absent, Axis, Panel, Section, Table
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.stored import names_of
from logitcask.engine.store import Segment
from logitcask.engine.store.inspect import describe_request

_ITEM, _VALUE = Axis(name="item"), Axis(name="value")
_OWN_DIGESTS = ("self_sha256", "ledger_sha256", "metrics_sha256", "plan", "run.out")
"""Keys of run.json that always differ between runs."""
_FIELDS = {"form": "estimator", "outside": "tail"}
"""Keys of an objective in run.json that have another name on the command line."""
SHORT = 12
"""Hex digits of a digest where its whole is in the table of digests."""


def provenance(runs: Sequence[RunFacts]) -> Section:
    """Return the tables of the first run, and of the keys in which others differ from it.

    A store alone is a run with an empty record.
    """
    first = runs[0]
    name = f": {first.name}" if len(runs) > 1 else ""
    panels: list[Panel] = []
    absent: list[Absent] = []
    if first.record:
        panels.append(_what_was_run(first, name))
    if first.config:
        panels.append(_settings(first, name))
    try:
        panels.append(_stored(first))
    except StoreError as error:  # none, or one whose log is damaged
        absent.append(Absent(title="Contents of the store", why=error.cause))
    if len(runs) > 1:
        panels.append(_differences(runs))
    if first.record:
        panels.append(_digests(first, name))
    return Section(
        id="provenance", title="What was run", panels=tuple(panels), absent=tuple(absent)
    )


def preset_of(run: RunFacts) -> Preset | None:
    """Return the preset of a run; None where it has none, or one that this version does not know.

    Its k is that of the run.
    """
    text, k = run.record.get("preset"), (run.record.get("objective") or {}).get("k")
    if not text:
        return None
    try:
        return parse_objective(text, k=k)
    except ObjectiveError:  # the record has its fields, which are shown
        return None


def short(digest: Any) -> str:
    """Return the beginning of a digest."""
    kind, colon, digits = str(digest).partition(":")
    return f"{kind}:{digits[:SHORT]}..." if colon else kind[:SHORT]


def _what_was_run(run: RunFacts, name: str) -> Table:
    return Table(
        id="provenance-run",
        title=f"What was run{name}",
        how="What run.json records. The objective is the loss of one position, p is the student "
        "and q the teacher. `logitcask store provenance RUN` checks the whole chain.",
        columns=(_ITEM, _VALUE),
        rows=tuple((item, value) for item, value in _items(run) if value),
    )


def _items(run: RunFacts) -> Iterator[tuple[str, str]]:
    record, config = run.record, run.config
    student, settings = record.get("student") or {}, config.get("run") or {}
    yield (
        "student",
        _joined(
            (config.get("student") or {}).get("model"),
            _given("revision", (config.get("student") or {}).get("revision")),
            _given("version", student.get("version")),
            short(student["weights"]) if "weights" in student else "",
        ),
    )
    yield "teacher", _joined(*names_of(record)[1], (config.get("teacher") or {}).get("model"))
    yield from _objective(run)
    loop = record.get("loop")
    yield "loop", ", ".join(f"{key} {value}" for key, value in (loop or {}).items())
    yield (
        "updates",
        _joined(record.get("updates"), _given("packs of an update", record.get("rows_per_update"))),
    )
    yield "rollouts", str(record.get("rollouts") or "")
    prompts = config.get("prompts") or {}
    yield (
        "prompts",
        _joined(prompts.get("file"), short(record["prompts"]) if "prompts" in record else ""),
    )
    pin = record.get("pin") or {}
    yield "snapshot", _joined(pin.get("number"), short(pin["sha256"])) if pin else ""
    yield "store", _joined((config.get("store") or {}).get("url"), record.get("store"))
    yield "seed", str(settings.get("seed", ""))
    yield "device", _joined(settings.get("device"), settings.get("dtype"))
    metadata = run.metadata or {}
    yield (
        "result",
        (
            f"version {metadata['version']}, {short(metadata.get('weights', ''))}"
            if metadata
            else "not saved yet"
        ),
    )


def _objective(run: RunFacts) -> Iterator[tuple[str, str]]:
    """Yield the objective in words, and the labels of the exactness report."""
    fields = run.record.get("objective") or {}
    preset = preset_of(run)
    yield "objective", str(run.record.get("preset") or "without a name")
    if preset is not None:
        yield "loss", preset.formula
        yield "source", preset.source
    yield (
        "fields",
        ", ".join(
            f"{_FIELDS.get(key, key)} {value}"
            for key, value in fields.items()
            if value not in (None, [], "")
        ),
    )
    exactness = run.record.get("exactness") or {}
    for label in ("scores", "support", "estimator", "prefixes"):
        yield label, str(exactness.get(label) or "")
    for note in exactness.get("notes") or ():
        yield "note", str(note)
    if preset is not None:
        yield "when the student moves", preset.staleness


def _settings(run: RunFacts, name: str) -> Table:
    kind = RunConfig if "loop" in run.config else TrainConfig
    rows = []
    for section, values in run.config.items():
        defaults = defaults_of(kind, section)
        for key, value in (values or {}).items():
            if key not in defaults:
                rows.append((f"{section}.{key}", plain(value), "must be given"))
            elif plain(defaults[key]) != plain(value):
                rows.append((f"{section}.{key}", plain(value), plain(defaults[key])))
    return Table(
        id="provenance-settings",
        title=f"Settings{name}",
        how="Settings with another value than the default; all others have the default.",
        columns=(Axis(name="key"), Axis(name="value"), Axis(name="default")),
        rows=tuple(rows),
    )


def defaults_of(kind: type[ConfigSection], section: str) -> Mapping[str, Any]:
    """Return key -> default of a section; keys that must be given are left out."""
    field = kind.model_fields.get(section)
    if field is None:
        return {}
    of = field.annotation
    assert isinstance(of, type)
    assert issubclass(of, ConfigSection)
    return {
        key: each.get_default(call_default_factory=True)
        for key, each in of.model_fields.items()
        if not each.is_required()
    }


def plain(value: Any) -> str:
    """Return a value of a configuration as text, the same for a default and for its JSON."""
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {plain(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return "none" if value is None else json.dumps(value, default=str).strip('"')


def _stored(run: RunFacts) -> Table:
    """Return a row for each name of rollouts and of scores, of a run for those that it read.

    Raises StoreError without a store, IntegrityError for a damaged record.
    """
    if run.snapshot is None:
        raise StoreError(run.store_missing, hint="make the report where the store is")
    rollouts, teachers = names_of(run.record)
    groups: dict[tuple[str, str], list[Segment]] = {}
    for segment in run.snapshot.segments:
        read = (rollouts,) if segment.kind == "rollout" else teachers
        if not any(read) or segment.name in read:
            groups.setdefault((segment.kind, segment.name), []).append(segment)
    rows = []
    for (kind, name), segments in groups.items():
        first = segments[0]
        model = first.provenance.get("student" if kind == "rollout" else "teacher") or {}
        backend = first.provenance.get("backend") or {}
        versions = sorted({each.version for each in segments}) if kind == "rollout" else [0]
        request = describe_request(first)
        if len(versions) > 1:
            request = request.replace(
                f"version {first.version}", f"versions {versions[0]} to {versions[-1]}"
            )
        rows.append(
            (
                "rollouts" if kind == "rollout" else "scores",
                name,
                str(model.get("name", "") if isinstance(model, Mapping) else model),
                request,
                ", ".join(f"{key} {value}" for key, value in backend.items())
                if isinstance(backend, Mapping)
                else str(backend),
                float(len(segments)),
                float(sum(each.rows for each in segments)),
            )
        )
    return Table(
        id="provenance-stored",
        title="Contents of the store",
        how="What the newest snapshot holds of these names: the model, the request, the program "
        "and its versions of the first segment, and positions, extensions not counted again.",
        columns=tuple(
            Axis(name=each)
            for each in ("kind", "name", "model", "request", "made by", "segments", "positions")
        ),
        rows=tuple(rows),
    )


def _differences(runs: Sequence[RunFacts]) -> Table:
    """Return the keys of run.json in which the runs differ."""
    each = [dict(leaves({**run.record, "settings": None})) for run in runs]
    keys = {key: None for leaf in each for key in leaf}
    rows = [
        (key.removeprefix("config."), *(plain(leaf.get(key, "")) for leaf in each))
        for key in keys
        if not key.endswith(_OWN_DIGESTS) and len({plain(leaf.get(key, "")) for leaf in each}) > 1
    ]
    return Table(
        id="provenance-differences",
        title="Differences between the runs",
        how="Keys of run.json in which the runs differ; all others are equal. Digests of results "
        "and folders are left out, because they always differ.",
        columns=(Axis(name="key"), *(Axis(name=run.name) for run in runs)),
        rows=tuple(
            (key, *(short(value) if value.startswith("sha256:") else value for value in values))
            for key, *values in rows
        ),
    )


def _digests(run: RunFacts, name: str) -> Table:
    rows = [
        *((key, str(value)) for key, value in leaves(run.record) if _is_digest(value)),
        *(
            (f"result: {key}", str(value))
            for key, value in leaves(run.metadata or {})
            if _is_digest(value)
        ),
    ]
    return Table(
        id="provenance-digests",
        title=f"Digests{name}",
        how="sha256 of weights, files and records, by their keys in run.json, and those of the "
        "result by their keys in logitcask.json. Equal digests are equal content.",
        columns=(Axis(name="of"), Axis(name="sha256")),
        rows=tuple(rows),
    )


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all values below a mapping."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")


def _given(label: str, value: Any) -> str:
    return "" if value in (None, "") else f"{label} {value}"


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))
