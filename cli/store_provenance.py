"""`logitcask store provenance`: what made a student."""

from collections.abc import Mapping
from typing import Any

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import Tree, print_event, print_result, print_tree
from logitcask.cli.progress import progress_bar


@click.command("provenance")
@click.argument("model")
@click.option(
    "--store", "url", help="Store of its segments; default: that of run.json, if it is there."
)
@click.option("--revision", default="", help="Commit or tag of a hub id.")
@format_option
def provenance_command(model: str, url: str | None, revision: str, form: str) -> None:
    """Show what made a student: its run, the scored segments, and the versions that sampled them.

    MODEL is the folder of a run, a folder of its versions, or a hub id of a pushed student. Files,
    weights and store are compared with the digests that were recorded; what could not be compared
    is listed too. Exit 4 where something is damaged or missing. A drift is the approximate KL (k3,
    nats) between the student that sampled and the one in training, an age the updates between them;
    means are over rows.

    Example: logitcask store provenance ./run --store ./store
    """
    from logitcask.engine.training.provenance.chain import trace

    with progress_bar():
        found = trace(model, revision=revision, url=url)
    if form == "json":
        print_result(found, form)
        return
    print_tree(_student(found))
    node: Any = found
    while node:
        for line in node.get("not_verified", ()):
            print_event(f"not verified: {node['folder']}: {line}")
        node = node.get("trained_from")


def _student(node: Mapping[str, Any]) -> Tree:
    """Return the tree of a student, and below it those of its data and its parent."""
    if "run" not in node:
        base = "base weights " if node.get("version") == 0 else "student "
        lost = node.get("note", "" if base != "student " else "its folder is not known here")
        text = f"{base}{_weights(node)} {node['name']}".rstrip()
        return (f"{text} ({lost})" if lost else text), []
    run, store, ledger = node["run"], node["store"], node["ledger"]
    pin = store["snapshot"]
    at = f", snapshot {pin['number']} {_short(pin['sha256'])}" if pin else ""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for group in node["teachers"]:
        groups.setdefault(group["teacher"], []).append(group)
    children: list[Tree] = [
        (f"store {store['uuid']}{at}", [_teacher(name, each) for name, each in groups.items()]),
        _student(node["trained_from"]),
    ]
    objective = run["objective"]
    text = objective if isinstance(objective, str) else "objective without a preset"
    made = f"run: {text}, {run['updates']} updates, settings {_short(run['settings'])}"
    trained = f"trained on {ledger['segments']} segments, {_spent(ledger)}"
    verified: list[Tree] = [(f"verified: {line}", []) for line in node["verified"]]
    head = f"student version {node['version']} {_weights(node)} {node['folder']}"
    return head, [*verified, (made, [(trained, []), *children])]


def _teacher(name: str, groups: list[Mapping[str, Any]]) -> Tree:
    models = {_model(model): None for group in groups for model in group["models"]}
    children: list[Tree] = []
    for group in groups:
        sampled: list[Tree] = [(f"sampled by {_model(model)}", []) for model in group["sampled_by"]]
        text = f"version {group['version']}: {group['segments']} segments, {_spent(group)}"
        children.append((text, sampled))
    return f"teacher {name}: {', '.join(models) or 'not known without the store'}", children


def _spent(counts: Mapping[str, Any]) -> str:
    """Return rows, ages and drift as text."""
    parts = [f"{counts['rows']} rows"]
    if (age := counts["age"]) is not None:
        parts.append(f"age {age[0]:g} to {age[2]:g}, mean {age[1]:.3g}")
    if (age := counts.get("teacher_age")) is not None:
        parts.append(f"teacher age {age[0]:g} to {age[2]:g}")
    if (drift := counts["drift"]) is not None:
        parts.append(f"drift {drift:.3g}")
    return ", ".join(parts)


def _model(model: Mapping[str, Any]) -> str:
    revision = f" at {model['revision']}" if model.get("revision") else ""
    return f"{model.get('name')}{revision} {_weights(model)}"


def _weights(node: Mapping[str, Any]) -> str:
    return _short(node.get("weights"))


def _short(digest: Any) -> str:
    """Return the first 12 hex digits of a digest; - for none."""
    return str(digest)[:19] if digest else "-"
