"""`logitcask doctor`: each fault of a machine and of a configuration is found, with a way out."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitcask.engine.doctor import configured, devices, folder, machine, packages
from logitcask.engine.findings import Finding
from logitcask.kernels.launch import triton_on_cpu
from tests.cli.conftest import CommandResult, World
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

ROOT = Path(__file__).resolve().parents[2]


def checks(result: CommandResult) -> dict[str, dict[str, str]]:
    return {each["check"]: each for each in result.json["checks"]}


def by_name(findings: Any) -> dict[str, Finding]:
    return {each.check: each for each in findings}


def test_a_machine_is_checked_without_torch_where_it_has_no_gpu(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from logitcask.cli.main import run\n"
        "code = run(['doctor', '--format', 'json'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    secret = "hf_secretsecretsecret"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"HF_TOKEN": secret},
        capture_output=True,
        text=True,
    )
    found = by_name(Finding(**each) for each in json.loads(done.stdout)["checks"])
    assert {"python", "packages", "cores", "memory", "open files", "disk", "[lora]"} <= {*found}
    assert "a token" in found["model cache"].message
    assert secret not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
    if version("torch").endswith("+cpu"):
        assert done.stderr.splitlines()[-1].endswith("False False")


def test_the_extras_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {*packages.NEEDED_FOR, *packages.FOR_DEVELOPERS} == {*extras}
    assert {*packages.OWN_ENVIRONMENT, *packages.FLAGS} <= {*extras}


def metadata_of(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    """Replace the metadata of this installation, and of all packages."""

    def version_of(name: str) -> str:
        if name not in installed:
            raise packages.PackageNotFoundError(name)
        return installed[name]

    needed = ["torch>=2.10", "transformers>=5.5", 'peft>=0.17; extra == "lora"']
    needed += ['ray>=2.50; extra == "ray"', 'deepspeed>=0.19; extra == "deepspeed"']
    needed += ['pytest>=8; extra == "dev"', 'only-there>=1; sys_platform == "none"']
    monkeypatch.setattr(packages, "requires", lambda name: needed)
    monkeypatch.setattr(packages, "version", version_of)

    class Metadata(dict[str, str]):
        def get_all(self, name: str) -> list[str]:
            return ["lora", "ray", "deepspeed", "dev"]

    monkeypatch.setattr(packages, "metadata", lambda name: Metadata({"Requires-Python": ">=3.99"}))


def test_versions_are_compared_with_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata_of(monkeypatch, {"torch": "2.9.1+cu130", "peft": "0.18.0", "ray": "2.1"})
    found = by_name(packages.check_packages())
    states = {name: each.state for name, each in found.items()}
    assert [n for n, s in states.items() if s == "fault"] == ["python", "torch", "transformers"]
    assert found["torch"].hint == 'pip install "torch>=2.10"'
    assert found["packages"].message.startswith("0 of 2 ")
    extras = by_name(packages.check_extras({"deepspeed": "train.sharding"}))
    states = {name: each.state for name, each in extras.items()}
    assert states == {"[lora]": "ok", "[deepspeed]": "fault", "[ray]": "note"}
    assert extras["[deepspeed]"].hint == 'pip install --no-build-isolation -e ".[deepspeed]"'
    assert "which train.sharding needs" in extras["[deepspeed]"].message
    assert extras["[ray]"].message.startswith("ray 2.1, not >=2.50")
    metadata_of(monkeypatch, {"torch": "2.13.0", "transformers": "5.23.0"})
    assert {e.state for e in packages.check_packages() if e.check != "python"} == {"ok"}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EROFS])
def test_a_disk_without_links_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(code, os.strerror(code))

    assert [e.state for e in folder.check_folder(tmp_path / "new" / "store")] == ["ok"]
    monkeypatch.setattr(os, "link", refuse)
    (found,) = folder.check_folder(tmp_path / "new")
    assert (found.state, os.strerror(code) in found.message) == ("fault", True)
    assert found.hint
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_nearly_full_or_late_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=9, f_favail=7))
    monkeypatch.setattr(folder.time, "time", lambda: 0.0)
    (found,) = folder.check_folder(tmp_path)
    assert found.state == "note"
    assert "1 MiB free" in found.message
    for text in ("store estimate", "7 more", "set the clocks"):
        assert text in found.hint
    (tmp_path / "file").write_text("")
    assert [e.state for e in folder.check_folder(tmp_path / "file")] == ["fault"]


def test_the_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP", limit)
    whole = machine.memory()[0]
    limit.write_text("max\n")
    assert machine.memory()[0] == whole
    limit.write_text(f"{1 << 20}\n")
    assert machine.memory() == (1 << 20, 1 << 20)
    found = by_name(machine.check_machine())
    assert (found["memory"].state, found["memory"].message) == ("note", "1 MiB free of 1 MiB")


def test_a_gpu_that_torch_does_not_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(build: str, driver: str, gpu: bool = False) -> dict[str, str]:
        monkeypatch.setattr(devices, "version", lambda name: build)
        monkeypatch.setattr(devices, "DRIVER", Path(driver))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return {name: each.state for name, each in by_name(devices.check_devices()).items()}

    assert states("2.13.0+cpu", "/none") == {"devices": "ok", "bfloat16": "ok"}
    assert states("2.13.0+cpu", "/")["devices"] == "note"
    assert states("2.13.0", "/none")["devices"] == "ok"
    assert states("2.13.0", "/")["devices"] == "fault"
    of_gpu = {"device_count": lambda: 1, "mem_get_info": lambda i: (1 << 30, 1 << 32)}
    of_gpu |= {"get_device_name": lambda i: "G", "get_device_capability": lambda i: (7, 5)}
    for name, value in of_gpu.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # The build of the tests has no CUDA, so no kernel is compiled.
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert states("2.13.0", "/", gpu=True) == {"cuda:0": "note", "triton": "fault"}
    found = by_name(devices.check_devices())
    assert "1 GiB free of 4 GiB" in found["cuda:0"].message
    assert "gcc" in found["triton"].hint


def test_the_trial_kernel_agrees_with_its_reference() -> None:
    assert devices.kernel_agrees(torch.device("cpu"))
    with triton_on_cpu():
        assert devices.kernel_agrees(torch.device("cpu"))


PAIR = "init --student @student --teacher @teacher --prompts @p.jsonl --no-chat-template"


def test_a_configuration_that_runs_has_no_fault(world: World, call: Any) -> None:
    file = world.new("d.toml")
    assert call(f"{PAIR} -o {file}").code == 0
    result = call(f"doctor {file} --format json")
    assert result.code == 0, result.out
    found = checks(result)
    named = ("settings", "student", "teacher", "tokenizers", "prompts", "size", "store", "run.out")
    assert {found[name]["state"] for name in named} == {"ok"}
    assert found["prompts"]["message"].startswith("8 in ")
    text = call("doctor @st")
    assert text.code == 0
    assert "has 8 segments" in text.out


def test_each_fault_of_a_configuration_is_found(
    world: World, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(*overrides: str, file: str = "@right.toml") -> dict[str, str]:
        """Return check -> message and hint of the faults."""
        sets = "".join(f" --set {each}" for each in overrides)
        found = checks(call(f"doctor {file} --format json{sets}"))
        return {
            n: f"{c['message']} | {c['hint']}" for n, c in found.items() if c["state"] == "fault"
        }

    assert call(f"{PAIR} -o @right.toml").code == 0
    text = (world.path / "right.toml").read_text()
    (world.path / "unclear.toml").write_text(text.replace("chat_template = false", ""))
    assert "prompts.chat_template" in faults(file="@unclear.toml")["prompts"]
    assert "8 prompts" in faults("loop.prompts_per_round=9")["prompts"]
    assert "loop.updates_per_round" in faults("loop.updates_per_round=99")["settings"]
    assert "no folder" in faults("student.model=none/of/these")["student"]
    assert "pickle" in faults("teacher.model=pickled")["teacher"]
    renamed = make_tokenizer(characters=CHARACTERS[:-1] + "é")
    save_folder(world.path / "renamed-2", make_model(seed=5), renamed)
    assert "student_tokenizer" in faults("teacher.model=renamed-2")["tokenizers"]
    monkeypatch.setattr(configured, "SERVER_WAIT_S", 0.1)
    assert "server" in faults("teacher.model=http://127.0.0.1:9")
    monkeypatch.setattr(configured, "memory", lambda: (1 << 10, 1 << 10))
    assert "lora.r" in faults()["size"]
    monkeypatch.setattr(configured, "cache_room", lambda: (Path(), 1 << 32))
    monkeypatch.setattr(configured, "find_model", lambda name: None)
    assert "HF_HOME" in faults("teacher.model=Qwen/Qwen3-4B")["teacher"]
    call("doctor --set run.seed=1").assert_error(2, "--set", "file of")
    call("doctor @none.toml").assert_error(2, "none.toml", "TOML file")
    result = call("doctor @no-store")
    assert (result.code, "not a logitcask store" in result.out) == (1, True)


def test_a_teacher_with_another_tokenizer_is_explained(world: World, call: Any) -> None:
    command = "init --student @student --teacher @other-tokenizer --prompts @p.jsonl"
    result = call(f"{command} --no-chat-template -o @spans.toml")
    assert result.code == 0, result.err
    assert "agree on" in result.err
    assert 'objective = "span_advantage"' in world.at("@spans.toml").read_text()
    found = checks(call("doctor @spans.toml --format json"))["tokenizers"]
    assert found["state"] == "note"
    assert "scores are of spans" in found["message"]
    assert "97 of the student's 99 ids have a token of the same bytes" in found["message"]
    assert "doctor tokenizers" in found["hint"]
    of_rows = checks(call("doctor @spans.toml --format json --set train.objective=overlap"))
    assert of_rows["tokenizers"]["state"] == "fault"
    assert "span_advantage" in of_rows["tokenizers"]["hint"]


def test_a_configuration_names_its_extras(world: World, call: Any) -> None:
    from logitcask.engine.config.parse.toml import read_toml

    assert call(f"{PAIR} -o @extras.toml").code == 0
    for key, extra in (
        ("lora.r=8", "lora"),
        ("store.url=s3://bucket/store", "s3"),
        ("teacher.model=http://127.0.0.1:9", "server"),
        ("prompts.file=hub:org/name", "data"),
        ('train.args={report_to="wandb"}', "trackers"),
        ("train.sharding=zero3", "deepspeed"),
        ("runner.kind=ray", "ray"),
        ("run.backend=vllm", "vllm"),
    ):
        config = read_toml(world.path / "extras.toml", [key])
        assert list(configured.extras_of(config)) == [extra], key
    assert configured.extras_of(read_toml(world.path / "extras.toml")) == {}
