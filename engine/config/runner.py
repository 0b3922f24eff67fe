"""The processes of a command. Nothing here changes what it computes, so a resume may change it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from logitcask.engine.config.section import Positive, Section


def _named_values(values: Any) -> Any:
    """Return the table of NAME=VALUE texts, the values of a flag."""
    if isinstance(values, tuple | list) and all("=" in str(each) for each in values):
        return dict(str(each).split("=", 1) for each in values)
    return values


Resources = Annotated[dict[str, float], BeforeValidator(_named_values)]
"""Name of a resource of Ray -> amount."""


class Runner(Section):
    kind: Literal["inline", "ray"] = Field(
        "inline",
        description="Where the work runs: inline = in this process; ray = in actors of a Ray "
        "cluster, which does a unit for each call, with a model loaded once.",
    )
    rollout: Positive = Field(1, description="Processes or actors that sample.")
    score: Positive = Field(1, description="Processes or actors that score.")
    restarts: int = Field(
        5,
        ge=0,
        description="With ray: restarts of one actor; after more the command ends with an error.",
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

    @field_validator("rollout_resources", "score_resources")
    @classmethod
    def _are_amounts(cls, values: dict[str, float]) -> dict[str, float]:
        for name, value in values.items():
            if value < 0 or (value > 1 and value % 1):
                raise ValueError(f"{name} must be a whole number, or a part of one, as 0.5")
        return values

    def count(self, role: str) -> int:
        """Return the number of processes of a role, rollout or score."""
        return {"rollout": self.rollout, "score": self.score}[role]

    def most_actors(self, role: str) -> int:
        """Return the number of actors of a role at most."""
        return max(self.count(role), self.max_actors)

    def resources(self, role: str) -> dict[str, float]:
        """Return the resources of one actor of a role."""
        return {"rollout": self.rollout_resources, "score": self.score_resources}[role]
