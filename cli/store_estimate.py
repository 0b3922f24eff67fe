"""`logitcask store estimate`: what scoring would cost, before it is paid for."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.options import MODEL_KEYS, config_from_flags, config_options, format_option
from logitcask.cli.output import print_event, print_result, print_table
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.cost import Cost
from logitcask.engine.config.sections import EstimateConfig


@click.command("estimate")
@click.argument("model")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "--student",
    "student__model",
    required=True,
    help="Model folder or hub id of the student, whose responses are scored.",
)
@config_options(
    EstimateConfig,
    {
        "prompts": ["chat_template", "chat_template_kwargs", "drop_last_assistant"],
        "estimate": ["sample", "teacher_topk_max"],
        "teacher": [
            "revision",
            "tokenizer",
            "served",
            "server",
            "student_tokenizer",
            "api_key_file",
            "server_wait",
        ],
        "rollout": ["n", "max_new_tokens", "student_topk", "mc_draws", "stop_token_ids", "grader"],
        "score": ["teacher_topk_min"],
        "cost": list(Cost.model_fields),
        "run": MODEL_KEYS,
    },
)
@format_option
def estimate_command(model: str, prompts: Path, form: str, **flags: Any) -> None:
    """Score a sample with teacher MODEL, and say what scoring all PROMPTS would cost.

    MODEL is a folder, a hub id or the URL of a server.

    For each profile, top-p and k-max: bytes per position, and the share of the KL between teacher
    and student that a loss on what is stored would miss (a little of it is rounding, either way).
    Nothing is stored.

    `all_prompts` also has the objects, and the requests that an object store bills: put and list
    requests in one price class, get requests in a cheaper one.

    With your prices, also GPU-hours and money of --runs trainings: with the teacher in the trainer,
    which scores in every run, and with its scores stored once.

    With --response-tokens no model is loaded and nothing is downloaded: hours come from the FLOP of
    the models and the peaks of --gpu; the output lists the assumptions.

    Example: logitcask store estimate ./teacher prompts.jsonl --student ./student
    """
    fixed = {"teacher__model": model, "teacher__name": "estimate", "prompts__file": prompts}
    job = config_from_flags(EstimateConfig, {**flags, **fixed})
    from logitcask.engine.commands.estimate import declared_costs, run_estimate

    if job.cost.response_tokens is not None:
        print_result(declared_costs(job), form)
        return
    with progress_bar() as progress:
        estimate = run_estimate(job, progress=progress, on_event=print_event)
    if form == "json":
        print_result(estimate, form)
        return
    print_result(estimate.summary(), form)
    print_event(
        "note: object stores bill put and list requests in one price class (class A at Google), "
        "get requests in a cheaper one (class B)"
    )
    click.echo()
    missed = ("forward_kl_missed", "reverse_kl_missed")
    print_table(
        [{**row, **{m: f"{round(row[m], 4) + 0.0:.2%}" for m in missed}} for row in estimate.rows],
        form,
    )
