"""The model card of a trained student: README.md with a YAML header, and its provenance in short.

It is replaced only while it is ours, as the card of a store is. Names come from records and from
other cards, so they appear only in code spans, and in the header only as plain identifiers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcask.engine.models.digests import replace_text
from logitcask.engine.models.identity import HUB_ID, NO_TEMPLATE, local_folder
from logitcask.engine.packing.teachers import Source
from logitcask.engine.store.transfer.card import CARD, MAX_CARD_BYTES, code_span, is_ours, signed
from logitcask.engine.teachers.refreshes import FOLLOW
from logitcask.engine.training.provenance.chain import totals
from logitcask.engine.training.provenance.ledger import sources_of
from logitcask.engine.types import ModelRef

_HEADER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_KEYS = {
    "base_model": r"[\w-][\w.-]*/[\w-][\w.-]*",
    "license": r"[a-z0-9][a-z0-9.-]{0,63}",
    "license_name": r"[\w-][\w.-]{0,63}",
    "license_link": r"https://[\w./%~=-]{1,200}|[\w-][\w.-]{0,63}",
}
"""Key of a header -> its values that are taken over."""
_SHOWN = ("loss", "overlap/", "entropy/", "kl/", "top1/", "nll/", "cache/")
"""Beginnings of the metrics that are shown."""


def build_card(
    parent: ModelRef,
    *,
    name: str,
    record: Mapping[str, Any],
    teachers: Mapping[str, Mapping[str, Any]],
    objective: str,
    lines: Sequence[Mapping[str, Any]],
    ledger: str,
    updates: int,
    metrics: Mapping[str, Any],
) -> str:
    """Return the card of a student.

    name: of its folder, or its Hub id; record: of run.json; teachers: name -> provenance of its
    model; objective: name of its preset; lines, ledger: of ledger.jsonl, and its sha256; metrics:
    the last lines of metrics.jsonl.
    """
    declared = _declared(parent)
    base = declared.get("base_model")
    header = [
        *(f'{key}: "{value}"' for key, value in declared.items()),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("logitcask", "knowledge-distillation", "on-policy-distillation")),
    ]
    body = [
        f"# {code_span(name.rpartition('/')[2])}",
        "",
        f"A student{f' of {code_span(base)}' if base else ''} that logitcask trained on the stored "
        "log-probs of a teacher.",
        "",
        "## How it was made",
        "",
        *_table([*_chain(parent, record, teachers, objective, lines, ledger, updates)]),
        "The ages of rows are counted in updates between the student that sampled them and the one "
        "in training, the drift is the approximate KL between the two, in nats. "
        "`logitcask store provenance` shows the whole chain from ledger.jsonl.",
        "",
        "## Last update",
        "",
        *_table(
            (key, f"{value:.4g}")
            for key, value in metrics.items()
            if isinstance(value, float | int) and key.startswith((*_SHOWN, "eval/"))
        ),
        *_usage(name, parent.template_digest != NO_TEMPLATE),
    ]
    return signed("---\n" + "\n".join(header) + "\n---\n", "\n".join(body), "logitcask")


def write_card(out: Path, card: str) -> bool:
    """Write the card of a folder and return True; False where another one is there, and stays."""
    file = out / CARD
    if file.exists() and not is_ours(file.read_bytes()[:MAX_CARD_BYTES].decode(errors="replace")):
        return False
    replace_text(file, card)
    return True


def _declared(parent: ModelRef) -> dict[str, str]:
    """Return the header's keys that the card of the parent gives: base model and license."""
    file = parent.path / CARD
    text = file.read_bytes()[:MAX_CARD_BYTES].decode(errors="replace") if file.is_file() else ""
    found = _HEADER.match(text)
    header = found[1] if found else ""
    values: dict[str, str] = {}
    for key, rule in _KEYS.items():
        if value := re.search(rf"^{key}: *([\"']?)({rule})\1 *\r?$", header, re.MULTILINE):
            values[key] = value[2]
    if parent.revision and "/" in parent.name and HUB_ID.fullmatch(parent.name):
        values["base_model"] = parent.name
    link = values.get("license_link", "")
    if link and not link.startswith("https://"):
        # A file of the parent's repository.
        values["license_link"] = (
            f"https://huggingface.co/{values.get('base_model')}/blob/main/{link}"
        )
        if "base_model" not in values:
            del values["license_link"]
    if "license" not in values:
        values = {key: value for key, value in values.items() if not key.startswith("license")}
    return values


def _chain(
    parent: ModelRef,
    record: Mapping[str, Any],
    teachers: Mapping[str, Mapping[str, Any]],
    objective: str,
    lines: Sequence[Mapping[str, Any]],
    ledger: str,
    updates: int,
) -> list[tuple[str, str]]:
    counts = totals(lines)
    age, drift, moved = counts["age"], counts["drift"], counts.get("teacher_age")
    pin = record.get("pin")
    sources = list(sources_of(lines))
    moving = {name: model[FOLLOW] for name, model in teachers.items() if FOLLOW in model}
    names = sorted({source.teacher for source in sources if source.teacher_version is None})
    return [
        ("version", f"{parent.version + updates}, after {updates} updates from {parent.version}"),
        ("base weights", code_span(parent.base_weights)),
        ("objective", code_span(objective or "without a preset")),
        *((f"teacher {code_span(name)}", _model(teachers.get(name, {}))) for name in names),
        *((f"teacher {code_span(name)}", _following(how, sources)) for name, how in moving.items()),
        ("store", code_span(str(record["store"]))),
        *([("snapshot", f"{pin['number']}, {code_span(pin['sha256'])}")] if pin else []),
        ("segments, rows", f"{counts['segments']:,}, {counts['rows']:,}"),
        *([("age", f"{age[0]:g} to {age[2]:g}, mean {age[1]:.3g}")] if age else []),
        *([("teacher age", f"{moved[0]:g} to {moved[2]:g}")] if moved else []),
        *([("drift", f"{drift:.3g}, at most {counts['largest_drift']:.3g}")] if drift else []),
        ("ledger.jsonl", code_span(ledger)),
    ]


def _following(how: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """Describe a teacher that follows the student, by its refreshes."""
    names = {source.teacher: source.teacher_version or 0 for source in sources}
    if not names:
        return "none of its scores were used"
    first, last = (code_span(by(names, key=names.__getitem__)) for by in (min, max))
    what = "the student itself" if how["kind"] == "student" else "the average of its weights"
    decay = f" with decay {how['ema_decay']:g}" if "ema_decay" in how else ""
    every = f"refreshed every {how['every']} updates"
    return f"{what}{decay}, {every}: {len(names)} refreshes, {first} to {last}"


def _model(model: Mapping[str, Any]) -> str:
    """Describe a teacher: by name only if it is of the Hub, for others are paths of one machine."""
    name = str(model.get("name", ""))
    of_hub = model.get("revision") or (HUB_ID.fullmatch(name) and local_folder(name) is None)
    shown = f"{code_span(name)} " if of_hub and "/" in name else ""
    return f"{shown}{code_span(str(model.get('weights', '')))}"


def _usage(name: str, chat: bool) -> list[str]:
    where = name if HUB_ID.fullmatch(name) and "/" in name else "PATH"
    prompt = ['inputs = tokenizer("2 + 3 =", return_tensors="pt")']
    if chat:
        prompt = [
            'messages = [{"role": "user", "content": "What is 2 + 3?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    return [
        "## Use it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
        f'model = AutoModelForCausalLM.from_pretrained("{where}", dtype="auto")',
        *prompt,
        "output = model.generate(**inputs, max_new_tokens=256, do_sample=True)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        "```",
        "",
        "To sample from it into a store, for a next round:",
        "",
        "```",
        f"logitcask rollout --model {where} --prompts prompts.jsonl --store ./store",
        "```",
        "",
    ]


def _table(rows: Any) -> list[str]:
    found = [f"| {name} | {value} |" for name, value in rows]
    return [found[0], "|---|---|", *found[1:], ""] if found else []
