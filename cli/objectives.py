"""`logitcask objectives`: what can be trained on a store, and what is exact of it."""

from typing import Any

import rich_click as click

from logitcask.cli.completion import complete_objective
from logitcask.cli.options import format_option
from logitcask.cli.output import print_result, print_table


@click.command("objectives")
@click.argument("name", required=False, shell_complete=complete_objective)
@format_option
def objectives_command(name: str | None, form: str) -> None:
    """List the objectives that have a name, or explain one.

    p is the student, q the teacher, ~ renormalised on S, sg[] held fixed, A = log q - log p, y the
    sampled id, s a span of tokens of two tokenizers. With a NAME, also its source, what it needs
    and what ages; it may have fields of its own and modifiers, as --objective takes it.

    Example: logitcask objectives "sampled_token+importance(cap=5)"
    """
    from logitcask.engine.objectives import PRESETS, parse_objective, served
    from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS

    if name is None:
        rows = [
            {
                "objective": p.name,
                "formula": p.formula,
                "served": served(p.objective),
                **({"source": p.source} if form == "json" else {}),
            }
            for p in PRESETS.values()
        ]
        print_table(rows, form)
        return
    preset = parse_objective(name)
    objective = preset.objective.record()
    modifiers = objective.pop("modifiers")
    if objective["form"] != "advantage" or preset.objective.support in SAMPLED_SUPPORTS:
        del objective["weights"]
    values: dict[str, Any] = {
        "objective": preset.name,
        "formula": preset.formula,
        "source": preset.source,
        "served": served(preset.objective),
        "needs": preset.needs,
        "staleness": preset.staleness,
        "note": preset.note,
        **{key: value for key, value in objective.items() if value is not None},
        "modifiers": modifiers,
    }
    print_result(values, form)
