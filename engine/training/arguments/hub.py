"""Push of a finished run's folder to the Hugging Face Hub.

Trainer would push checkpoints on the way, which are no proved models. Here the repository is made
before anything is loaded, and the folder is pushed once it is complete. The token is the one of
`hf auth login` or HF_TOKEN.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.config.runner import LOGS, TIMELINE
from logitcask.engine.errors import ConfigError, StoreError
from logitcask.engine.training.run_dir.files import (
    CHECKPOINTS,
    RUN,
    TEACHER,
    TENSORBOARD,
    VERSIONS,
)

NOT_PUSHED = [
    *(f"{folder}/*" for folder in (CHECKPOINTS, TENSORBOARD, VERSIONS, LOGS, TIMELINE)),
    *(".*", RUN, TEACHER),
]
"""Patterns; run.json names folders of this machine."""


def open_repo(args: Mapping[str, Any], out: Path) -> str | None:
    """Make the repository that [train.args] asks for, and return its id; None without a push.

    Raises ConfigError where that is not possible.
    """
    if not args.get("push_to_hub", False):
        return None
    from huggingface_hub import HfApi

    name = args.get("hub_model_id") or out.resolve().name
    try:
        made = HfApi().create_repo(name, private=args.get("hub_private_repo"), exist_ok=True)
    except Exception as error:  # its errors share no base class: HTTP, validation, token, network
        raise ConfigError(
            f"train.args.push_to_hub: the repository {name} cannot be made: "
            f"{' '.join(str(error).split())[:200]}",
            hint="log in with `hf auth login`, or set HF_TOKEN and hub_model_id",
        ) from error
    repo: str = made.repo_id
    return repo


def push(repo: str, args: Mapping[str, Any], out: Path) -> str:
    """Push the folder of a finished run, and return its address. Raises StoreError."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().upload_folder(
            repo_id=repo,
            folder_path=out,
            revision=args.get("hub_revision"),
            ignore_patterns=NOT_PUSHED,
            commit_message="Student of logitcask",
        )
    except Exception as error:  # as above
        raise StoreError(
            f"{out} is complete, and was not pushed to {repo}: "
            f"{' '.join(str(error).split())[:200]}",
            hint="run the same command again: it only pushes",
        ) from error
    return str(info.commit_url)
