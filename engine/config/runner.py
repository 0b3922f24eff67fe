"""Processes of a command, and workers that share a store."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from logitcask.engine.config.section import Positive, Section

LOGS, TIMELINE = "logs", "timeline"
"""Folders in that of a run: what its processes print, and what they do when."""
_GROUP = re.compile(r"1|torchrun:([1-9][0-9]{0,3})")
_GPUS = re.compile(r"|[A-Za-z0-9-]+(,[A-Za-z0-9-]+)*")


def _named_values(values: Any) -> Any:
    """Return the table of NAME=VALUE texts, the values of a flag."""
    if isinstance(values, tuple | list) and all("=" in str(each) for each in values):
        return dict(str(each).split("=", 1) for each in values)
    return values


def _amounts(values: dict[str, float]) -> dict[str, float]:
    for name, value in values.items():
        if value < 0 or (value > 1 and value % 1):
            raise ValueError(f"{name} must be a whole number, or a part of one, as 0.5")
    return values


Resources = Annotated[dict[str, float], BeforeValidator(_named_values), AfterValidator(_amounts)]
"""Name of a resource of Ray -> amount."""


class Runner(Section):
    """The keys of a runner that stages and loops share."""

    rollout: Positive = Field(1, description="Processes or actors that sample.")
    score: Positive = Field(1, description="Processes or actors that score.")
    restarts: int = Field(
        5,
        ge=0,
        description="Restarts of one process within ten minutes; with ray, of each actor in all, "
        "and of those that train together. After more the command ends with an error.",
    )
    ray_address: str = Field(
        "",
        description="With ray: address of the cluster, HOST:6379; empty = RAY_ADDRESS, else the "
        "cluster of this machine, or one for this command alone.",
    )
    rollout_resources: Resources = Field(
        {},
        description="With ray: resources of one actor that samples, GPU=0.5 for a half of a GPU, "
        "or a name of your own; by default CPU=1, and GPU=1 if the cluster has GPUs.",
    )
    score_resources: Resources = Field(
        {},
        description="With ray: resources of one actor that scores, GPU=0.5 for a half of a GPU, "
        "or a name of your own; by default CPU=1, and GPU=1 if the cluster has GPUs.",
    )
    max_actors: int = Field(
        0,
        ge=0,
        description="With ray: actors of a stage at most. More than at the start are started while "
        "the cluster has free resources for them, and end with their nodes; 0 = no more.",
    )

    def count(self, role: str) -> int:
        """Return the number of processes of a role, rollout or score."""
        return {"rollout": self.rollout, "score": self.score}[role]

    def most_actors(self, role: str) -> int:
        """Return the number of actors of a role at most."""
        return max(self.count(role), self.max_actors)

    def resources(self, role: str) -> dict[str, float]:
        """Return the resources of one actor of a role."""
        return {"rollout": self.rollout_resources, "score": self.score_resources}[role]


class StageRunner(Runner):
    """The runner of `rollout` and `score`."""

    kind: Literal["inline", "ray"] = Field(
        "inline",
        description="Where the work runs: inline = in this process; ray = in actors of a Ray "
        "cluster, which does a unit for each call, with a model loaded once.",
    )


def _text_of(value: Any) -> Any:
    """Accept 1 for "1"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text_of)]


class LoopRunner(Runner):
    """The runner of `distill`."""

    kind: Literal["inline", "processes", "ray"] = Field(
        "inline",
        description="Where a loop runs: inline = its stages in turn, in one process; processes = "
        "sampling, scoring and training at once, in processes of this machine that are started "
        "again when they die; ray = likewise, in actors of a Ray cluster.",
    )
    train: Text = Field(
        "1",
        description="Processes, or actors, that train: 1, or torchrun:N for N that share each "
        "update, with the environment that torchrun gives.",
    )
    rollout_gpus: Text = Field(
        "",
        description="With processes: GPUs of those that sample, such as 0,1, as "
        "CUDA_VISIBLE_DEVICES takes them, in equal parts; empty = each process sees all GPUs.",
    )
    score_gpus: Text = Field("", description="GPUs of the processes that score, likewise.")
    train_gpus: Text = Field("", description="GPUs of the processes that train, likewise.")
    train_resources: Resources = Field(
        {}, description="With ray: resources of each actor that trains, as rollout_resources."
    )

    @field_validator("train")
    @classmethod
    def _is_a_group(cls, train: str) -> str:
        if not _GROUP.fullmatch(train):
            raise ValueError("must be 1 or torchrun:N, as torchrun:2")
        return train

    @field_validator("rollout_gpus", "score_gpus", "train_gpus")
    @classmethod
    def _divides_evenly(cls, gpus: str, info: ValidationInfo) -> str:
        if not _GPUS.fullmatch(gpus):
            raise ValueError("must be numbers or names of GPUs with commas between them, as 0,1")
        role = str(info.field_name).removesuffix("_gpus")
        if gpus and role in info.data:
            processes, listed = _count(info.data[role]), len(gpus.split(","))
            if listed % processes:
                raise ValueError(
                    f"must list as many GPUs for each of the {processes} processes of {role}"
                )
        return gpus

    @property
    def ranks(self) -> int:
        """Return the number of processes that train."""
        return _count(self.train)

    def gpus(self, role: str) -> list[str]:
        """Return CUDA_VISIBLE_DEVICES of each process of a role, of all that train together; empty
        texts for all GPUs.
        """
        if role == "train":
            return [self.train_gpus]  # LOCAL_RANK chooses among them
        listed = {"rollout": self.rollout_gpus, "score": self.score_gpus}[role].split(",")
        count = self.count(role)
        part = len(listed) // count
        return [",".join(listed[i * part : (i + 1) * part]) for i in range(count)]


def _count(processes: int | str) -> int:
    return int(str(processes).removeprefix("torchrun:"))


class Work(Section):
    """A worker that shares a store with other workers."""

    worker: bool = Field(
        False,
        description="Stay, and do what is missing as it appears, among any number of workers on "
        "the same store. SIGTERM ends it after the unit in hand, Ctrl-C at once.",
    )
    worker_name: str = Field(
        "",
        max_length=128,
        description="With --worker: name of this worker in claims and failures; empty = host-pid.",
    )
    lease_seconds: float = Field(
        600.0,
        gt=0,
        description="With --worker: seconds after which the unit of a worker that shows no life is "
        "taken over. Less than a stall of the store, and units are done twice.",
    )
    poll: float = Field(
        2.0,
        gt=0,
        description="With --worker: seconds between two looks at a store with nothing to do.",
    )
    max_attempts: Positive = Field(
        3,
        description="With --worker: failures of a unit, of all workers together, after which it is "
        "left alone until `store retry-failed`; the command then ends with exit code 3.",
    )
    idle_exit: float = Field(
        0.0,
        ge=0,
        description="With --worker: seconds with nothing to do after which the command ends; "
        "0 = never.",
    )
    prompts_per_version: int = Field(
        0,
        ge=0,
        description="With --worker: sample so many prompts of each version of the student, from "
        "where those of the version before end and again from the first after the last, and go to "
        "a later version between two units; 0 = all prompts of a version before the next one.",
    )
    max_unscored: int = Field(
        0,
        ge=0,
        description="With --worker: begin no unit while more than so many units of the name "
        "have no "
        "scores by any teacher; 0 = sample on. Bounds how far rollouts run ahead.",
    )
