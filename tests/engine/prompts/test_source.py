"""Prompts from Parquet, Arrow, folders of `datasets` and the Hub: equal to the same as JSONL."""

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.engine.config.prompts import Columns
from logitcask.engine.errors import ConfigError, PromptError
from logitcask.engine.prompts.prompts import read_prompts
from logitcask.engine.prompts.source import open_source
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.types import Prompt
from tests.engine.tiny import make_tokenizer

TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "[2,3]"}}]}
ROWS: list[dict[str, Any]] = [
    {"id": 7, "messages": [{"role": "user", "content": "hi"}], "answer": 5, "level": {"of": [1]}},
    {
        "id": 8,
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "2+3"},
            CALL,
            {"role": "tool", "content": "5"},
        ],
        "tools": json.dumps([TOOL]),
    },
]
SHOWS_ALL = "{{ tools|tojson }}{{ messages|tojson }}"
"""A template that writes all that it gets, so that two renderings are equal only as a whole."""


def template(text: str = SHOWS_ALL) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def read(source: Any, columns: Mapping[str, str] | None = None, **rules: Any) -> list[Prompt]:
    limit = rules.pop("limit", None)
    opened = open_source(source, Columns(**(columns or {})), limit=limit)
    rendering = Rendering(chat_template=True, **rules)
    return read_prompts(opened, template(), rendering, max_prompt_tokens=999, limit=limit)


def jsonl(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the rows with all keys in each, also inside, null where they have none."""
    names = dict.fromkeys(key for row in rows for key in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def parquet(file: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table_of(rows), file)
    return file


def arrow(file: Path, *, stream: bool = True) -> Path:
    table = table_of(ROWS)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    return file


def saved(folder: Path) -> Path:
    """Write a folder as Dataset.save_to_disk does."""
    arrow(folder / "data-00000-of-00001.arrow")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "f00"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_all_formats_give_the_prompts_of_the_jsonl_file(tmp_path: Path) -> None:
    expected = read(jsonl(tmp_path))
    assert [each.id for each in expected] == ["7", "8"]
    assert [each.answer for each in expected] == ["5", None]
    assert expected[0].extra == {"level": {"of": [1]}}
    text = template().decode(expected[1].token_ids)
    assert json.loads(text[: text.index("][") + 1]) == [TOOL]
    assert json.loads(text[text.index("][") + 1 :]) == ROWS[1]["messages"]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    saved(tmp_path / "both" / "train")
    for source, split in (
        (parquet(tmp_path / "p.parquet"), ""),
        (arrow(tmp_path / "stream.arrow"), ""),
        (arrow(tmp_path / "file.arrow", stream=False), ""),
        (saved(tmp_path / "saved"), ""),
        (tmp_path / "both", "train"),
        (parquet(tmp_path / "parts" / "train-00000-of-00001.parquet").parent, "train"),
    ):
        assert read(source, {"split": split}) == expected, source


def test_datasets_itself_writes_what_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(table_of(ROWS).to_pylist())})
    whole.save_to_disk(tmp_path / "d")
    opened = open_source(tmp_path / "d")
    assert read(opened.file) == read(jsonl(tmp_path))
    fingerprint = json.loads((tmp_path / "d/train/state.json").read_text())["_fingerprint"]
    assert opened.record == {"file": "d", "fingerprint": fingerprint}


def test_columns_are_mapped_in_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [
        {"key": n, "messages": None, "task": {"prompt": [{"role": "user", "content": f"{n}"}]}}
        | {"reward_model": {"ground_truth": str(n)}, "answer": "not this"}
        for n in (4, 5)
    ]
    names = {"prompt_column": "task.prompt", "id_column": "key"}
    names["answer_column"] = "reward_model.ground_truth"
    for source in (jsonl(tmp_path, rows), parquet(tmp_path / "p.parquet", rows)):
        found = read(source, names)
        assert [(each.id, each.answer) for each in found] == [("4", "4"), ("5", "5")]
        assert found[0].extra["answer"] == "not this"
        assert '"4"' in template().decode(found[0].token_ids)
        assert open_source(source, Columns(**names)).record == {"file": source.name, **names}
        for key in names:
            with pytest.raises(PromptError, match=rf'0|1: field "nokey" is missing.*{key}'):
                read(source, {**names, key: "nokey"})


@pytest.mark.parametrize(
    ("column", "cause"),
    [
        (pa.array([None] * 69 + [b"x"]), 'field "more": it is of type binary, no text'),
        (pa.array([None] * 69 + [{"bytes": b"x", "path": "a.png"}]), "it is a picture, a sound"),
        (pa.array([None] * 69 + [[{"x": {"bytes": None, "path": "a.wav"}}]]), r'"more\[0\].x"'),
        (pa.array([None] * 69 + [float("nan")]), "NaN is not JSON"),
        (pa.array([None] * 69 + ["x" * (1 << 20)]), "its text is longer than 1048576"),
    ],
)
def test_what_is_not_text_is_refused_by_row(tmp_path: Path, column: Any, cause: str) -> None:
    table = pa.table({"prompt": ["x"] * 70, "more": column})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=rf"p\.parquet, row 69: .*{cause}"):
        read(tmp_path / "p.parquet")
    # A row that is not needed is not read.
    assert [each.id for each in read(tmp_path / "p.parquet", limit=2)] == ["row-0", "row-1"]


def test_values_that_json_lacks_are_written_as_text(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    table = pa.table(
        {
            "prompt": pa.array(["x"]).dictionary_encode(),
            "day": [day],
            "n": pa.array(["1.50"]).cast(pa.decimal128(4, 2)),
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())),
            "json": pa.array(['{"a": null}'], pa.json_()),
        }
    )
    with pa.OSFile(str(tmp_path / "p"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    (prompt,) = read(tmp_path / "p")
    text = {"day": "2026-01-02", "n": "1.50", "map": {"a": 1}, "json": {"a": None}}
    assert prompt.extra == text


@pytest.mark.parametrize("group", [200, 8000])
def test_reading_holds_a_bounded_part_of_a_file(tmp_path: Path, group: int) -> None:
    file, bare = tmp_path / "p.parquet", {"compression": "NONE", "use_dictionary": False}
    table = pa.table({"prompt": [f"{n:02000}" for n in range(8000)]})
    pq.write_table(table, file, row_group_size=group, data_page_size=1 << 16, **bare)
    del table
    before, most = pa.total_allocated_bytes(), 0
    for _ in open_source(file).lines():
        most = max(most, pa.total_allocated_bytes() - before)
    assert file.stat().st_size > 8000 * 2000
    assert most < 4e6


def test_splits_are_named_where_there_are_several(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test", "part.0-1a2b3c4d-x"):
        parquet(parts / f"{name}.parquet", [{"id": name, "prompt": "x"}])
    assert [p.id[:9] for p in read(parts, {"split": "train"})] == ["train-000"] * 2
    assert [p.id for p in read(parts, {"split": "part"})] == ["part.0-1a2b3c4d-x"]
    for split in ("", "dev"):
        with pytest.raises(PromptError, match=r"has the splits 'part', 'test', 'train'"):
            read(parts, {"split": split})
    for columns, cause in (({"split": "x"}, "has no splits"), ({"subset": "x"}, "no subsets")):
        with pytest.raises(PromptError, match=cause):
            read(jsonl(tmp_path), columns)


def test_damaged_and_strange_folders_are_named(tmp_path: Path) -> None:
    damaged = parquet(tmp_path / "p.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(PromptError, match=r"p\.parquet cannot be read: "):
        read(damaged)
    state = saved(tmp_path / "saved") / "state.json"
    for text, cause in (
        ('{"_data_files": [{"filename": "../p.parquet"}]}', "names files outside"),
        ("{}", "lists no _data_files"),
        ("x", "is not JSON"),
    ):
        state.write_text(text)
        with pytest.raises(PromptError, match=cause):
            read(state.parent)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the commit of org/name, which lies in the cache of `datasets`, and go offline."""
    datasets = pytest.importorskip("datasets")
    commit = "a" * 40
    folder = tmp_path / "cache" / "org___name" / "default" / "0.0.0" / commit
    file = arrow(folder / "name-train.arrow")
    with pa.memory_map(str(file)) as mapped:
        schema = pa.ipc.open_stream(mapped).schema
    split = {"name": "train", "num_examples": 2, "num_bytes": 9, "dataset_name": "name"}
    info = {"config_name": "default", "dataset_name": "name", "builder_name": "parquet"}
    info |= {"features": datasets.Features.from_arrow_schema(schema).to_dict()}
    info |= {"version": "0.0.0", "splits": {"train": split}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return commit


def test_a_data_set_of_the_hub_is_read_by_revision(hub: str, tmp_path: Path) -> None:
    expected = read(jsonl(tmp_path))
    assert read("hub:org/name") == read(f"hub:org/name@{hub}", {"split": "train"}) == expected
    assert read("hub:org/name", {"subset": "default"}, limit=1) == expected[:1]
    record = open_source("hub:org/name").record
    assert record == {"file": "hub:org/name", "split": "train", "revision": hub}
    for name, columns, cause in (
        (f"hub:org/name@{'b' * 40}", {}, f"is of revision {hub}"),
        ("hub:org/name@main", {}, f"is of revision {hub}"),
        ("hub:org/name", {"split": "test"}, "has the splits 'train'"),
        ("hub:org/name", {"subset": "main"}, "ValueError: Couldn't find cache .* 'main'"),
        ("hub:org/other", {}, "ConnectionError: Couldn't reach"),
        ("hub:name", {}, "names no data set"),
        ("hub:../name", {}, "is a folder here|names no data set|cannot be read"),
    ):
        with pytest.raises(PromptError, match=cause):
            read(name, columns)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(PromptError, match="org/name is a folder here"):
        read("hub:org/name")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "p.parquet")
    for package, source in (("pyarrow", file), ("datasets", "hub:org/name")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(ConfigError, match=f"need the package {package}") as caught:
                read(source)
            assert caught.value.hint == 'pip install -e ".[data]"'


def test_a_system_prompt_goes_before_conversations_without_one(tmp_path: Path) -> None:
    notes: list[str] = []
    rendering = Rendering(chat_template=True, system_prompt="be kind")
    own = {"messages": ROWS[1]["messages"][:2]}
    file, tokenizer = jsonl(tmp_path, [ROWS[0], own, {"prompt": "x"}]), make_tokenizer()
    read = read_prompts(file, tokenizer, rendering, max_prompt_tokens=99, on_event=notes.append)
    text = [tokenizer.decode(each.token_ids) for each in read]
    assert text[0] == "system: be kind\nuser: hi\nassistant: "
    assert text[1].startswith("system: be brief\nuser: 2+3\n")
    assert text[2] == "system: be kind\nuser: x\nassistant: "
    assert "1 of 3 prompts have a system turn of their own" in notes[0]
    assert Rendering(**rendering.record()) == rendering
    for chat, form, cause in (
        (False, "", "no chat template is used"),
        (True, "{{ messages[-1].content }}", "leaves system turns out"),
        (True, "{{ raise_exception('no') if messages|length > 1 }}x", "refuses a system turn"),
    ):
        rules = Rendering(chat_template=chat, system_prompt="be kind")
        with pytest.raises(ConfigError, match=f"system_prompt = 'be kind': .*{cause}"):
            read_prompts(file, template(form), rules, max_prompt_tokens=99)
