"""`logitcask recipe list` and `show`: named settings."""

from typing import Any

import rich_click as click

from logitcask.cli.completion import complete_recipe
from logitcask.cli.options import config_from_flags, config_options, flag_values, format_option
from logitcask.cli.output import print_result, print_table
from logitcask.engine.config.cost import Cost
from logitcask.engine.config.sections import CostConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.recipes.named import (
    PAIRS,
    load_recipe,
    read_recipe,
    recipe_names,
    recipe_toml,
)

COST_KEYS = [key for key in Cost.model_fields if key != "prompt_count"]


@click.command("list")
@format_option
def list_command(form: str) -> None:
    """List the named settings of `distill --recipe NAME`.

    Those of kind pairs are whole configurations, with the models of a published run; those of kind
    settings leave student, teacher, prompts and store to you.

    Example: logitcask recipe list
    """
    recipes = [load_recipe(name) for name in recipe_names()]
    rows = [
        {
            "recipe": each.name,
            "kind": each.kind,
            "about": each.header.about,
            **({"source": each.header.source} if form == "json" else {}),
        }
        for each in recipes
    ]
    print_table(rows, form)


@click.command("show")
@click.argument("name", shell_complete=complete_recipe)
@config_options(CostConfig, {"cost": COST_KEYS})
@format_option
def show_command(name: str, form: str, **flags: Any) -> None:
    """Show the source of a recipe, what differs from it, and the keys that it sets, as TOML.

    Of a pair also the costs: GPU-hours of its stages, bytes of its store, and money with your
    prices. Without --response-tokens each response has rollout.max_new_tokens, an upper bound. No
    model is loaded.

    Example: logitcask recipe show r1-1.5b-from-justrl-1.5b --response-tokens 4000
    """
    recipe = load_recipe(name)
    cost = config_from_flags(CostConfig, flags).cost
    found: dict[str, Any] = {}
    if recipe.kind == PAIRS:
        from logitcask.engine.recipes.costs import recipe_costs

        found = recipe_costs(read_recipe(name, None), cost)
    elif flag_values(flags):
        raise ConfigError(
            f"recipe {name} names no models, so it has no costs",
            hint="leave the flags of costs out, or show a recipe of kind pairs",
        )
    if form == "json":
        header = {"recipe": name, "kind": recipe.kind, **recipe.header.model_dump()}
        print_result({**header, "tables": recipe.tables, "costs": found}, form)
        return
    click.echo(recipe_toml(recipe))
    if found:
        click.echo()
        print_result(found, form)


NAMED = (list_command, show_command)
"""Commands of `logitcask recipe`."""
