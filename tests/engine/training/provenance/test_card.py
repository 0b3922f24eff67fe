"""The model card of a student: valid for the Hub, and nothing in it is markup of a stranger."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from logitcask.engine.models.identity import NO_TEMPLATE
from logitcask.engine.packing.teachers import Source
from logitcask.engine.training.provenance.card import build_card, write_card
from logitcask.engine.types import ModelRef

DIGEST = "sha256:" + "1" * 64
PARENT = ModelRef(
    name="org/base",
    path=Path("none"),
    revision="f" * 40,
    digest=DIGEST,
    tokenizer_digest=DIGEST,
    template_digest=DIGEST,
    n_vocab=9,
    stop_ids=(1,),
    version=2,
    base_weights=DIGEST,
)
SOURCE = Source(rollouts="a" * 32, version=1, teacher="big", scores=("b" * 32,))
LINES = [
    {
        "update": update,
        **({"segments": [SOURCE._asdict()]} if update == 1 else {}),
        "rows": {"0": 10 * update},
        "age": [update, update, update],
        "drift": update / 100,
    }
    for update in (1, 2)
]


def card(parent: ModelRef, **change: Any) -> str:
    fields: dict[str, Any] = {
        "name": "org/student",
        "record": {"store": "uuid", "pin": {"number": 7, "sha256": DIGEST}},
        "teachers": {"big": {"name": "org/teacher", "revision": "main", "weights": DIGEST}},
        "objective": "overlap",
        "lines": LINES,
        "ledger": DIGEST,
        "updates": 2,
        "metrics": {
            "loss": 0.12345,
            "train/lr": 1e-3,
            "eval/accuracy": 0.5,
            "cache/coverage": None,
        },
    }
    return build_card(parent, **(fields | change))


def parent_with(folder: Path, header: str, **change: Any) -> ModelRef:
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Base\nlicense: mit\n")
    return replace(PARENT, path=folder, **change)


def test_the_chain_in_short(tmp_path: Path) -> None:
    """Weigh by rows: ages 1 and 2 of 10 and 20 rows have the mean 5/3, and so has the drift."""
    text = card(parent_with(tmp_path, "license: apache-2.0\nlanguage: en"))
    found = ModelCard(text).data
    assert (found.base_model, found.license) == ("org/base", "apache-2.0")
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    assert "logitcask" in found.tags
    for line in (
        "| version | 4, after 2 updates from 2 |",
        f"| teacher `big` | `org/teacher` `{DIGEST}` |",
        f"| snapshot | 7, `{DIGEST}` |",
        "| segments, rows | 1, 30 |",
        "| age | 1 to 2, mean 1.67 |",
        "| drift | 0.0167, at most 0.02 |",
        "| loss | 0.1235 |",
        "| eval/accuracy | 0.5 |",
        'from_pretrained("org/student")',
        "logitcask rollout --model org/student",
        "apply_chat_template",
    ):
        assert line in text, line
    assert "train/lr" not in text
    assert "chat_template" not in card(replace(PARENT, template_digest=NO_TEMPLATE))


@pytest.mark.parametrize(
    ("header", "base", "license_id", "link"),
    [
        ("", "org/base", None, None),
        ("license: [mit]", "org/base", None, None),
        (
            'license: "other"\nlicense_name: qwen\nlicense_link: LICENSE',
            "org/base",
            "other",
            "LICENSE",
        ),
        ("license_link: https://a.b/c", "org/base", None, None),
        ("license: mit # evil\nlicense: x: y", "org/base", None, None),
        ("base_model: other/base\nlicense: mit", "org/base", "mit", None),
    ],
)
def test_a_license_is_that_of_the_parent_or_none(
    tmp_path: Path, header: str, base: str, license_id: str | None, link: str | None
) -> None:
    found = ModelCard(card(parent_with(tmp_path, header))).data
    assert (found.get("base_model"), found.get("license")) == (base, license_id)
    url = link and f"https://huggingface.co/org/base/blob/main/{link}"
    assert found.get("license_link") == url


def test_a_folder_has_the_base_model_of_its_card_and_shows_no_path(tmp_path: Path) -> None:
    local = {"name": str(tmp_path), "revision": ""}
    teachers = {"big": {"name": str(tmp_path / "teacher"), "revision": "", "weights": DIGEST}}
    text = card(
        parent_with(tmp_path, "base_model: org/far", **local), teachers=teachers, name="run"
    )
    assert ModelCard(text).data.base_model == "org/far"
    assert str(tmp_path) not in text
    bare = card(replace(PARENT, **local), name="run")
    assert ModelCard(bare).data.base_model is None
    assert 'from_pretrained("PATH")' in bare


def test_text_of_records_is_no_markup() -> None:
    evil = "x`\n---\n<script>| a |\nlicense: mit"
    text = card(
        PARENT,
        name=evil,
        objective=evil,
        record={"store": evil},
        teachers={"big": {"name": evil, "revision": "1", "weights": evil}},
    )
    assert ModelCard(text).data.get("license") is None
    lines = [line for line in text.splitlines() if "script" in line]
    assert lines
    for line in lines:
        code = line[line.index("`") : line.rindex("`") + 1]
        assert "<script>" not in line.replace(code, "")


def test_a_teacher_that_follows_has_one_line(tmp_path: Path) -> None:
    names = [(f"self.v{version}-{version:08}", version) for version in (0, 2, 10)]
    sources = [
        SOURCE._replace(teacher=name, teacher_version=version)._asdict() for name, version in names
    ]
    line = {"update": 1, "segments": sources, "rows": {"0": 3, "2": 1}, "teacher_age": [0, 1, 4]}
    how = {"kind": "ema", "every": 2, "ema_decay": 0.95}
    teachers = {"self": {"name": "org/base", "weights": DIGEST, "follow": how}}
    text = card(parent_with(tmp_path, ""), lines=[line], teachers=teachers)
    assert (
        "| teacher `self` | the average of its weights with decay 0.95, refreshed every 2 updates: "
        "3 refreshes, `self.v0-00000000` to `self.v10-00000010` |"
    ) in text
    assert "| teacher age | 0 to 4 |" in text


def test_a_card_of_others_stays(tmp_path: Path) -> None:
    assert write_card(tmp_path, card(PARENT))
    again = card(PARENT, objective="opd")
    assert write_card(tmp_path, again)
    assert (tmp_path / "README.md").read_text() == again
    (tmp_path / "README.md").write_text(again.replace("`opd`", "`mine`"))
    assert not write_card(tmp_path, card(PARENT))
    assert "`mine`" in (tmp_path / "README.md").read_text()
