"""`logitcask evaluate`: numbers of a student, or of every version of a run during its training."""

from typing import Any

import rich_click as click

from logitcask.cli.options import config_options, flag_values, format_option
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.cli.worker import stop_at_sigterm
from logitcask.engine.config.sections import EvaluateConfig
from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.config.training import Eval


@click.command("evaluate")
@click.argument("model")
@click.option("--store", "store__url", help="Store of the training; default: that of the run.")
@config_options(
    EvaluateConfig,
    {
        "store": ["rollouts"],
        "student": ["revision"],
        "eval": list(Eval.model_fields),
        "train": [
            *("objective", "loss_topk", "base", "teacher_field", "pack_length"),
            *TeacherMix.model_fields,
        ],
        "work": ["worker", "poll", "idle_exit"],
        "run": ["device", "dtype", "batch_tokens", "seed"],
    },
)
@format_option
def evaluate_command(model: str, form: str, **flags: Any) -> None:
    """Evaluate a student: graded responses to prompts, and held-out rows, by the trainer's code.

    MODEL is the folder of a run or of one of its versions, whose settings are taken where no flag
    replaces them, or any model with --store and --eval-prompts. For the same float32 weights the
    numbers are those that the trainer writes.

    --worker stays with a training: it evaluates the versions that `distill` publishes in
    RUN/versions as they appear, writes a line for each into RUN/evaluations.jsonl, and ends with
    the final student. The trainer keeps each version of --eval-every until it has its line; without
    it the newest one that is there is next. The same command resumes.

    Example: logitcask evaluate ./run --eval-prompts eval.jsonl
    """
    from logitcask.engine.commands.evaluate import (
        evaluate_config,
        run_evaluate,
        watch_evaluations,
    )

    config = evaluate_config(model, flag_values(flags))
    with progress_bar() as progress:
        if not config.work.worker:
            found = run_evaluate(config, progress=progress, on_event=print_event)
        else:
            with stop_at_sigterm() as stop:
                found = watch_evaluations(
                    config, stop=stop, progress=progress, on_event=print_event
                )
    print_result(found, form)
