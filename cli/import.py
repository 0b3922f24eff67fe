"""`logitcask import`: rollouts of other programs into a store."""

from typing import Any

import rich_click as click

from logitcask.cli.options import MODEL_KEYS, config_from_flags, config_options, format_option
from logitcask.cli.output import print_event, print_report
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.sections import Import, ImportConfig


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@config_options(
    ImportConfig,
    {
        "imported": [name for name in Import.model_fields if name != "files"],
        "student": ["model", "revision"],
        "store": ["url", "rollouts", "profile"],
        "run": MODEL_KEYS,
    },
)
@format_option
def import_command(files: tuple[str, ...], form: str, **flags: Any) -> None:
    """Read the rollouts or texts of other programs into a store.

    FILES are JSONL or Parquet, or folders of JSONL; with --from tap the store of a tap, whose
    teacher's scores are taken over too. The student, --model, gives its own top-k and
    log-probs of every position, as for rollouts that it sampled; `score` and `train` follow as
    usual. Committed units are not scored again: rerun the same command to resume.
    engine/exchange/README.md has the formats.

    Example: logitcask import --from nemo-rl logs/train_data --model ./student --store ./store
    """
    from logitcask.engine.commands.adopt import run_import

    config = config_from_flags(ImportConfig, flags | {"imported__files": files})
    with progress_bar() as progress:
        report = run_import(config, progress=progress, on_event=print_event)
    print_report(report, form)
