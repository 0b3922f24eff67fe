"""`logitcask recipe list` and `show`: named settings."""

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import print_result, print_table
from logitcask.engine.recipes.named import load_recipe, recipe_names, recipe_toml


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
@click.argument("name")
@format_option
def show_command(name: str, form: str) -> None:
    """Show the source of a recipe, what differs from it, and the keys that it sets, as TOML.

    Example: logitcask recipe show opd
    """
    recipe = load_recipe(name)
    if form == "json":
        header = {"recipe": name, "kind": recipe.kind, **recipe.header.model_dump()}
        print_result({**header, "tables": recipe.tables}, form)
        return
    click.echo(recipe_toml(recipe))


NAMED = (list_command, show_command)
"""Commands of `logitcask recipe`."""
