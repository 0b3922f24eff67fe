"""The dataset card of a pushed store: README.md with a YAML header.

Names of models and requests come from records that a stranger may have written, so they appear only
in code spans, without line breaks and backticks. A card is replaced only while it is ours: its
marker holds the sha256 of the rest.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.identity import HUB_ID
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.inspect import bytes_per_position, committed_bytes, describe_request
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.storage.hub import HubAddress

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
_MARKER = re.compile(r"<!-- logitcask card (sha256:[0-9a-f]{64}): .*-->\n")
_LICENSE = re.compile(r"^license: ([a-z0-9][a-z0-9.-]{0,63})$", re.MULTILINE)
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
_LARGER = "n>1T"
_MAX_TEXT = 120
"""Characters of a text from a record."""


def build_card(snapshot: Snapshot, address: HubAddress, license_id: str) -> str:
    """Return the card of a snapshot. Raises ConfigError for a license that is no identifier.

    license_id: an identifier of the Hub, '' = none.
    """
    title = address.repo.partition("/")[2]
    if license_id and not _LICENSE.fullmatch(f"license: {license_id}"):
        raise ConfigError(
            f"--license {license_id!r} is no license identifier",
            hint="give one of the Hub's list, such as apache-2.0, cc-by-4.0 or other",
        )
    rollouts = [s for s in snapshot.segments if s.kind == schema.ROLLOUT]
    sequences = sum(s.counts["N"] for s in rollouts)
    header = [
        f'pretty_name: "{title}"',
        *([f"license: {license_id}"] if license_id else []),
        "task_categories:",
        "- text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("logitcask", "knowledge-distillation", "logits")),
        "size_categories:",
        f"- {size_category(sequences)}",
        "viewer: false",
    ]
    body = "\n".join(
        [
            f"# {title}",
            "",
            "A logitcask store: responses that a student sampled, and the log-probs that teachers "
            "gave to every position of them. A student is trained from it without a teacher.",
            "",
            *_contents(snapshot, rollouts, sequences),
            *_usage(snapshot, rollouts, address),
        ]
    )
    return signed("---\n" + "\n".join(header) + "\n---\n", body, "logitcask store push")


def signed(header: str, body: str, command: str) -> str:
    """Return a card with a marker, by which `is_ours` knows it; command: what may replace it."""
    return (
        f"{header}<!-- logitcask card {_digest(header + body)}: "
        f"`{command}` replaces this file unless it is edited -->\n{body}"
    )


def is_ours(card: str) -> bool:
    """Return whether logitcask wrote this card, and nothing in it was edited since."""
    found = _MARKER.search(card)
    return found is not None and found[1] == _digest(_MARKER.sub("", card, count=1))


def license_of(card: str) -> str:
    """Return the license of a card that is ours; '' = none."""
    found = _LICENSE.search(card.partition("\n---\n")[0])
    return found[1] if found else ""


def size_category(sequences: int) -> str:
    """Return the Hub's name for a number of rows, which are sequences here."""
    limit = 1000
    for name in _SIZES:
        if sequences < limit:
            return name
        limit *= 10
    return "1B<n<10B" if sequences < limit else _LARGER


def _contents(snapshot: Snapshot, rollouts: list[Segment], sequences: int) -> list[str]:
    positions = sum(s.counts["P"] for s in rollouts)
    each = bytes_per_position(snapshot)
    lines = [
        "## Contents",
        "",
        f"| snapshot | {snapshot.number} |",
        "|---|---|",
        f"| its sha256 | `{snapshot.sha256}` |",
        f"| segments | {len(snapshot.segments):,} |",
        f"| sequences | {sequences:,} |",
        f"| response positions | {positions:,} |",
        f"| bytes | {committed_bytes(snapshot.segments):,} |",
        f"| bytes a position: rollouts, scores | {each['rollout']:.1f}, {each['score']:.1f} |",
        "",
        "Rollouts:",
        "",
    ]
    for name in snapshot.names(schema.ROLLOUT):
        found = snapshot.rollouts(name)
        student = found[0].provenance.get("student")
        lines.append(
            f"- `{name}`: {sum(s.counts['P'] for s in found):,} positions; student "
            f"{_model(student)}; {code_span(describe_request(found[0]))}; "
            f"prompts {code_span(_value(found[0].provenance.get('set'), 'digest'))}"
        )
    lines += ["", "Scores:", ""]
    for name in snapshot.names(schema.SCORE):
        scores = [s for s in snapshot.segments if s.kind == schema.SCORE and s.name == name]
        kind = snapshot.role(name)
        lines.append(
            f"- `{name}`: {sum(s.rows for s in scores):,} positions; teacher "
            f"{_model(scores[0].provenance.get('teacher'))}"
            f"{f', kind {code_span(kind)}' if kind else ''}; "
            f"{code_span(describe_request(scores[0]))}"
        )
    return [*lines, "" if lines[-1] else "none\n"]


def _usage(snapshot: Snapshot, rollouts: list[Segment], address: HubAddress) -> Iterable[str]:
    url = address.url()
    names, teachers = snapshot.names(schema.ROLLOUT), snapshot.names(schema.SCORE)
    student = _value(rollouts[0].provenance.get("student"), "name") if rollouts else ""
    model = student if HUB_ID.fullmatch(student) and "/" in student else "STUDENT"
    which = [f"--rollouts {names[0]}"] if len(names) > 1 else []
    which += [f"--teacher {teachers[0]}"] if len(teachers) > 1 else []
    layouts = {s.layout for s in snapshot.segments if teachers and s.name == teachers[0]}
    loss = ["--objective span_advantage"] if layouts.intersection(schema.SPAN_LAYOUTS) else []
    yield from [
        "## Train from it",
        "",
        "```",
        " ".join(
            [
                f"logitcask train --model {model} --store {url}",
                f"--snapshot {snapshot.number}",
                *(*which, *loss, "--out ./run"),
            ]
        ),
        "```",
        "",
        "A copy on a disk is faster for more than one training, and can be extended:",
        "",
        "```",
        f"logitcask store pull {url} ./store",
        " ".join([f"logitcask train --model {model} --store ./store", *loss, "--out ./run"]),
        "```",
        "",
    ]
    if not rollouts:
        return
    path = address.file(rollouts[0].path)
    yield from [
        "## Read it with Zarr",
        "",
        "Each segment is an uncompressed zip file with one Zarr v3 group:",
        "",
        "```python",
        "import zarr",
        "from huggingface_hub import hf_hub_download",
        "",
        f'path = hf_hub_download("{address.repo}", "{path}", repo_type="dataset")',
        'group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")',
        "print(group.tree())",
        "```",
        "",
    ]


def _model(record: object) -> str:
    """Describe a model of a record: its name, and its revision if it has one."""
    name, revision = _value(record, "name"), _value(record, "revision")
    return code_span(name) + (f" at {code_span(revision)}" if revision else "")


def _value(record: object, key: str) -> str:
    """Return a text of a record, '' where the record is of another form."""
    found = record.get(key, "") if isinstance(record, Mapping) else ""
    return found if isinstance(found, str) else ""


def code_span(text: str) -> str:
    """Return a text from a record as a code span of one line, in which nothing is markup."""
    plain = "".join(c if c.isprintable() and c != "`" else " " for c in text)
    shown = " ".join(plain.split())[:_MAX_TEXT].rstrip()
    return f"`{shown}`" if shown else "not recorded"


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
