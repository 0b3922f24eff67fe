"""Optimizers and fields of [train.args]: tried before a load, exact in training."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError, IdentityError, StoreError
from logitcask.engine.store import Store
from logitcask.engine.training.arguments import hub
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.settings import settings_record, training_arguments
from logitcask.engine.training.train import NO_LORA, train
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import REVERSE, make_case

ONE = {"learning_rate": 1e-2, "pack_length": 256, "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef]:
    units = [make_unit(0, prompts=2, vocab=99, lengths=[30, 24, 17, 36])]
    return make_case(tmp_path_factory.mktemp("case"), units, hidden=16, layers=1)


def run(case: tuple[Store, ModelRef], out: Path, **settings: Any) -> TrainReport:
    """Run one update of one pack."""
    return train(
        case[0],
        model=case[1],
        teacher="big",
        objective=REVERSE,
        settings=Train(**(ONE | settings)),
        run=Run(out=out, device="cpu"),
    )


def moves(case: tuple[Store, ModelRef], out: Path) -> torch.Tensor:
    """Return the change of all weights, in one vector."""
    before, after = (load_file(x / "model.safetensors") for x in (case[1].path, out))
    return torch.cat([(after[n] - before[n]).flatten() for n in sorted(before)]).double()


def test_sgd_steps_along_the_gradient_and_adam_by_its_sign(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    """First updates: SGD moves by lr x g; AdamW by lr x g / (|g| + eps), which tells g again."""
    norm = run(case, tmp_path / "sgd", optim="sgd").last["train/grad_norm"]
    by_sgd = moves(case, tmp_path / "sgd")
    assert float(by_sgd.norm()) == pytest.approx(1e-2 * norm, rel=1e-4)
    eps = float(by_sgd.abs().max()) * 1e2  # as large as the gradients
    run(case, tmp_path / "adam", args={"adam_epsilon": eps})
    gradient = by_sgd / -1e-2
    expected = -1e-2 * gradient / (gradient.abs() + eps)
    assert (moves(case, tmp_path / "adam") - expected).abs().max() < 1e-6
    record = json.loads((tmp_path / "adam" / "run.json").read_text())["settings"]
    assert record["args"] == {"adam_epsilon": eps}
    assert "optim" not in record
    with pytest.raises(IdentityError, match="adam_epsilon"):
        run(case, tmp_path / "adam")


def test_other_optimizers_of_torch_train(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    for name in ("adafactor", "adagrad", "rmsprop", "adamw_torch"):
        run(case, tmp_path / name, optim=name)
        assert 0 < float(moves(case, tmp_path / name).abs().max()) < 0.2, name
    momentum = {"optim_args": "momentum=0.5", "run_name": "x"}
    args = training_arguments(
        Train(optim="sgd", args=momentum), Run(out=tmp_path / "sgd", device="cpu")
    )
    assert args.optim_args == "momentum=0.5"


@pytest.mark.parametrize(
    ("settings", "cause", "hint"),
    [
        pytest.param(
            {"optim": "adamw_8bit"},
            "does not run here: ImportError",
            "pip install bitsandbytes",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="it is here"),
        ),
        ({"optim": "sgd", "adam_beta2": 0.9}, "sgd does not read it", "of Adam's kind"),
        ({"optim": "sgd", "args": {"adam_epsilon": 1e-6}}, "sgd does not read it", "Adam's kind"),
        ({"args": {"optim_args": "momentum=1"}}, "does not read momentum", "what it takes: "),
        ({"optim": "sgd", "args": {"optim_args": "momentum"}}, "is not NAME=VALUE", "write"),
        ({"optim": "sgd", "args": {"optim_args": "momentum=x"}}, "ValueError", "optim_args"),
        ({"args": {"lr_scheduler_kwargs": {"num_cycles": 2}}}, "constant schedule", "cosine"),
        (
            {"lr_scheduler_type": "cosine", "args": {"lr_scheduler_kwargs": {"cycles": 2}}},
            "unexpected keyword argument 'cycles'",
            "lr_scheduler_kwargs",
        ),
        ({"args": {"adam_epsilon": "small"}}, "valid number", "adam_epsilon: float"),
        ({"args": {"torch_empty_cache_steps": -1}}, "an integer bigger than 0", "[train.args]"),
        ({"args": {"report_to": "tensorbord"}}, "is no tracker", "tensorboard"),
        ({"args": {"report_to": "clearml"}}, "clearml is not installed", "pip install clearml"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_does_not_run_is_refused_before_a_load(
    settings: dict[str, Any], cause: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        training_arguments(Train(**settings), Run(out=tmp_path, device="cpu"))
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_only_fields_that_change_numbers_are_recorded(tmp_path: Path) -> None:
    settings = Train(args={"run_name": "a", "ddp_timeout": 60, "full_determinism": False})
    run = Run(out=tmp_path, device="cpu")
    assert settings_record(settings, NO_LORA, run)["args"] == {"full_determinism": False}
    assert training_arguments(settings, run).run_name == "a"
    plain = training_arguments(Train(), run)
    assert (plain.run_name, plain.report_to, plain.save_total_limit) == (tmp_path.name, [], 2)


def test_the_finished_folder_is_pushed_and_nothing_before(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import CommitInfo, HfApi, RepoUrl

    calls: list[tuple[str, bool | None]] = []
    online = {"create": False, "upload": False}

    def create(self: Any, repo_id: str, **options: Any) -> RepoUrl:
        if not online["create"]:
            raise OSError("no token")
        calls.append((repo_id, options["private"]))
        return RepoUrl("https://huggingface.co/me/" + repo_id)

    def upload(self: Any, **options: Any) -> CommitInfo:
        if not online["upload"]:
            raise OSError("the line is cut")
        names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        whole = {
            "logitcask.json",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "README.md",
        }
        assert whole <= names, "it is proved and complete"
        assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
        page = Path(hub.__file__).parents[1] / "README.md"
        by_hand = re.findall(r"^hf upload .*? --exclude (.*)$", page.read_text(), re.MULTILINE)
        assert [shlex.split(each) for each in by_hand] == [options["ignore_patterns"]]
        assert options["ignore_patterns"] == [
            *("checkpoints/*", "tensorboard/*", "versions/*", "logs/*", "timeline/*"),
            *(".*", "run.json", "teacher.json"),
        ]
        calls.append((options["repo_id"], options["revision"]))
        url = "https://huggingface.co/me/student/commit/1"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="1")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    out = tmp_path / "student"
    args = {"push_to_hub": True, "hub_private_repo": True}
    with pytest.raises(ConfigError, match="the repository student cannot be made: no token"):
        run(case, out, args=args)
    assert not (out / "checkpoints").exists()
    online["create"] = True
    with pytest.raises(StoreError, match="is complete, and was not pushed to me/student"):
        run(case, out, args=args)
    online["upload"] = True
    calls.clear()
    assert run(case, out, args=args).resumed_at == 1, "only the push is left"
    assert calls == [("student", True), ("me/student", None)]
