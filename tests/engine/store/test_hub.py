"""Stores on the Hugging Face Hub: push, pull and reading by URL, against a stand-in on loopback."""

import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from logitcask.engine.errors import ConfigError, IntegrityError, StoreError
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.retention import delete, tag
from logitcask.engine.store.storage.base import open_storage
from logitcask.engine.store.storage.hub import HubStorage
from logitcask.engine.store.transfer import card
from logitcask.engine.store.transfer.copy import copy_store
from logitcask.engine.store.transfer.hub import PushReport, push_to_hub
from logitcask.engine.store.verify import verify
from tests.engine.store.hub_server import Hub, hub_server
from tests.engine.store.made import ROLLOUT_PROVENANCE, commit_rollouts, commit_scores

# The Hub's client uses a deprecated argument of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/set"
URL = f"hf://datasets/{REPO}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Make a store of two rollout segments, one of them scored."""
    made = open_store(tmp_path / "store", create=True)
    commit_scores(made, commit_rollouts(made, 1, student=True), 1)
    commit_rollouts(made, 2)
    return made


def push(store: Store, url: str = URL, **fields: Any) -> PushReport:
    return push_to_hub(store, url, **{"snapshot": store.head(), **fields})


def test_a_pushed_store_is_read_by_url_and_pulled(store: Store, hub: Hub, tmp_path: Path) -> None:
    report = push(store)
    assert (report.segments, report.there, report.records, report.card) == (3, 0, 3, "written")
    read = open_store(URL)
    assert read.url == f"{URL}@{hub.repos[REPO].branches['main']}" == report.store
    assert read.head() == store.head()
    assert pickle.loads(pickle.dumps(read)).head() == store.head()
    rollouts = [s.read_rollouts(store.head().segments[0]) for s in (store, read)]
    assert rollouts[0].tokens.tolist() == rollouts[1].tokens.tolist()
    assert rollouts[0].prompts == rollouts[1].prompts
    (scored,) = read.head().scores("teacher").values()
    assert read.read_scores(scored).lp.tolist() == store.read_scores(scored).lp.tolist()
    assert verify(read, deep=True).orphans == ()
    copied = copy_store(read, open_storage(tmp_path / "copy"), snapshot=read.head())
    assert (copied.segments, copied.records) == (3, 3)
    pulled = open_store(tmp_path / "copy")
    assert pulled.head() == store.head()
    assert verify(pulled, deep=True).segments == 3
    commit_rollouts(pulled, 3)
    assert pulled.head().number == 3, "a pulled store is written on"
    names = [name for name in hub.head(REPO) if not name.startswith(("log/", "bundles/", "seg/"))]
    assert sorted(names) == [".gitattributes", "README.md", "format.json"]


def test_only_what_is_new_is_pushed_and_pulled(store: Store, hub: Hub, tmp_path: Path) -> None:
    push(store)
    old = open_store(URL)
    target = open_storage(tmp_path / "copy")
    copy_store(old, target, snapshot=old.head())
    uploads = hub.uploads
    commit_rollouts(store, 3)
    report = push(store)
    assert (report.segments, report.there, report.records) == (1, 3, 1)
    assert hub.uploads == uploads + 1
    commits = len(hub.repos[REPO].commits)
    assert push(store).card == "unchanged"
    assert push(store, snapshot=store.snapshot(1)).newest == 3, "an older one is there already"
    assert len(hub.repos[REPO].commits) == commits, "nothing new, no commit"
    assert old.head().number == 2, "an open store keeps its commit"
    new = open_store(URL)
    copied = copy_store(new, target, snapshot=new.head())
    assert (copied.segments, copied.there, copied.records) == (1, 3, 1)
    assert open_store(tmp_path / "copy").head() == store.head()


def test_a_log_is_pushed_as_bundles(store: Store, hub: Hub, tmp_path: Path) -> None:
    """Push 20 records, then 40: each time the fewest objects, and the same log everywhere."""

    def names() -> list[str]:
        return sorted(n for n in hub.head(REPO) if n.startswith(("log/", "bundles/")))

    for i in range(17):
        tag(store, f"t{i}", i % 3)
    push(store)
    assert names() == [
        "bundles/16/0000000000.jsonl",
        *(f"log/{n:010d}.json" for n in range(16, 20)),
    ]
    read = open_store(URL)
    target = open_storage(tmp_path / "copy")
    copy_store(read, target, snapshot=read.head())
    copied = open_store(tmp_path / "copy")
    for i in range(17, 37):
        tag(store, f"t{i}", i % 3)
    # A bundle is a copy, so a damaged one does no harm.
    bundle = tmp_path / "store/bundles/16/0000000016.jsonl"
    bundle.write_bytes(bundle.read_bytes()[:-2] + b"x\n")
    assert push(store).records == 20
    assert names() == [
        "bundles/16/0000000000.jsonl",
        "bundles/16/0000000016.jsonl",
        *(f"log/{n:010d}.json" for n in range(32, 40)),
    ]
    new = open_store(URL)
    copy_store(new, target, snapshot=new.head())
    assert len(target.names("log")) == 4 + 20, "a reader of 20 records needs each one"
    assert target.names("bundles/16") == ["0000000000.jsonl", "0000000016.jsonl"]
    for other in (new, copied, open_store(tmp_path / "copy"), read):
        expected = store.head() if other is not read else store.snapshot(19)
        assert other.head() == expected
    assert verify(new).orphans == verify(copied).orphans == ()
    # A copy of the copy, whose first records are in a bundle alone.
    assert copied.log.read_record(3) == store.log.read_record(3)
    copy_store(copied, open_storage(tmp_path / "third"), snapshot=copied.snapshot(3))
    assert open_store(tmp_path / "third").head() == store.snapshot(3)


def test_a_push_that_stops_at_any_request_is_continued(store: Store, hub: Hub) -> None:
    """Stop before each writing request in turn: no commit has half a store; a rerun completes."""
    for stop in range(20):
        repo = f"org/set{stop}"
        hub.fail_after, hub.uploads = stop, 0
        hub.large.clear()
        with suppress(StoreError):
            push(store, f"hf://datasets/{repo}")
            break
        hub.fail_after = -1
        for sha in hub.repos[repo].commits if repo in hub.repos else ():
            storage = HubStorage(f"hf://datasets/{repo}@{sha}")
            assert storage.read("format.json", 4096) is None
        push(store, f"hf://datasets/{repo}")
        assert hub.uploads == 3, "no segment is sent twice"
        assert verify(open_store(f"hf://datasets/{repo}")).segments == 3
    assert stop == 9


def test_a_copy_that_stops_at_any_call_is_continued(store: Store, tmp_path: Path) -> None:
    """Stop at each put and each record: what is there is a store of fewer records, or none."""
    for i in range(15):
        tag(store, f"t{i}", 0)
    target, head = tmp_path / "copy", store.head()
    for stop in range(30):
        storage: Any = open_storage(target)
        calls = iter(range(stop))
        for name in ("put", "create"):
            setattr(storage, name, stopping(getattr(storage, name), calls))
        with suppress(StoreError):
            copy_store(store, storage, snapshot=head)
            break
        if (target / "format.json").exists():
            partial = open_store(target)
            assert partial.head().sha256 == store.log.sha256(partial.head().number)
            for each in partial.head().segments:
                partial.read_object(each)
        elif (target / "bundles/16").exists():
            with pytest.raises(StoreError, match="holds an unfinished copy of a store"):
                open_store(target, create=True)
    assert stop > 3
    assert open_store(target).head() == head
    assert all(name.startswith("staging/") for name in verify(open_store(target)).orphans)


def stopping(call: Any, calls: Iterator[int]) -> Any:
    """Return a call that raises once `calls` are used up."""

    def stopped(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise StoreError("stopped", hint="")
        return call(*arguments)

    return stopped


def test_a_tag_is_pushed_without_what_was_deleted(store: Store, hub: Hub, tmp_path: Path) -> None:
    """Push only what the snapshot and tags reach; a verification of the copy accepts that."""
    commit_rollouts(store, 3, name="other")
    delete(store, rollouts="other")
    push(store)
    assert sum(name.startswith("seg/") for name in hub.head(REPO)) == 3
    read = open_store(URL)
    report = verify(read)
    assert (report.segments, report.left_out) == (3, 1)
    copy_store(read, open_storage(tmp_path / "copy"), snapshot=read.head())
    assert verify(open_store(tmp_path / "copy"), deep=True).left_out == 1
    (tmp_path / "copy" / read.head().segments[0].path).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        verify(open_store(tmp_path / "copy"))
    # An older snapshot, at which that segment was visible.
    push(store, "hf://datasets/org/old", snapshot=store.snapshot(3))
    before = open_store("hf://datasets/org/old")
    assert before.head() == store.snapshot(3)
    assert verify(before).segments == 4


def test_another_or_a_diverged_store_is_refused(store: Store, hub: Hub, tmp_path: Path) -> None:
    push(store)
    other = open_store(tmp_path / "other", create=True)
    with pytest.raises(StoreError, match="holds another store"):
        push(other)
    read = open_store(URL)
    copy_store(read, open_storage(tmp_path / "copy"), snapshot=read.head())
    commit_rollouts(open_store(tmp_path / "copy"), 3)
    commit_rollouts(store, 4)
    push(store)
    with pytest.raises(StoreError, match="has log records that .* does not have") as caught:
        push(open_store(tmp_path / "copy"))
    assert "merge" in caught.value.hint
    read = open_store(URL)
    with pytest.raises(StoreError, match="has log records that"):
        copy_store(read, open_storage(tmp_path / "copy"), snapshot=read.head())


def test_a_store_in_a_folder_and_a_private_repository(store: Store, hub: Hub) -> None:
    report = push(store, f"{URL}/stores/one", private=True)
    assert report.store.endswith("/stores/one")
    assert hub.repos[REPO].private
    assert open_store(f"{URL}/stores/one").head() == store.head()
    names = [name for name in hub.head(REPO) if not name.startswith("stores/one/")]
    assert names == [".gitattributes"]
    hub.repos[REPO].private = False
    with pytest.raises(StoreError, match="exists and is public"):
        push(store, private=True)


def test_reads_are_bounded_and_pinned(store: Store, hub: Hub) -> None:
    push(store)
    storage = open_storage(URL)
    segment = store.head().segments[0]
    data = store.read_object(segment)
    assert storage.read(segment.path, len(data)) == data
    with pytest.raises(IntegrityError, match=f"{len(data)} bytes where at most 10 are allowed"):
        storage.read(segment.path, 10)
    for start, size in ((0, 5), (7, 100), (len(data) - 3, 9), (len(data), 4), (3, 0)):
        assert storage.read_part(segment.path, start, size) == data[start : start + size]
    assert storage.read("nothing", 10) is storage.read_part("nothing", 0, 10) is None
    assert storage.names("nothing") == []
    assert storage.names("log", after="0000000000.json") == [
        "0000000001.json",
        "0000000002.json",
    ]
    assert storage.read_all({"format.json": 4096, "no": 1})["no"] is None
    for call in (
        lambda: storage.create("x", b""),
        lambda: storage.put("x", b""),
        lambda: storage.remove("x"),
        lambda: open_store(f"{URL}@empty", create=True),
    ):
        hub.commit(REPO, {}, "empty")
        with pytest.raises(StoreError, match="on the Hub is only read") as caught:
            call()
        assert "store pull" in caught.value.hint
    # Damage there is an error that names the file.
    hub.commit(REPO, {**hub.head(REPO), segment.path: data[:-1] + b"x"})
    with pytest.raises(IntegrityError, match=segment.path):
        verify(open_store(URL))


def test_files_that_the_hub_leaves_out_are_found(store: Store, hub: Hub) -> None:
    hub.ignored = ("seg/rollout",)
    with pytest.raises(StoreError, match=r"lacks 2 pushed files, such as \['seg/") as caught:
        push(store)
    assert ".gitignore" in caught.value.hint
    hub.ignored = ()
    assert push(store).segments == 2
    assert verify(open_store(URL)).segments == 3


def test_errors_of_the_hub_are_typed(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="no such dataset") as caught:
        open_store(URL)
    assert "hf auth login" in caught.value.hint
    push(store, private=True)
    with pytest.raises(StoreError, match="no such revision"):
        open_store(f"{URL}@v9")
    monkeypatch.setenv("HF_TOKEN", "hf_canaryOther")
    with pytest.raises(StoreError, match="no such dataset"):
        open_store(URL)
    with pytest.raises(StoreError, match="cannot create") as caught:
        push(store)
    assert "with a token" in caught.value.hint
    assert "canary" not in str(caught.value)
    for url in (
        "hf://org/set",
        "hf://datasets/org",
        "hf://datasets/org/set/../x",
        "hf://user:canary@datasets/org/set",
        "hf://datasets/org/set?token=canary",
    ):
        with pytest.raises(StoreError, match="hf:// that is not a dataset") as caught:
            open_store(url)
        assert "canary" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=f"cannot open {URL}: ConnectError") as caught:
        open_store(URL)
    assert "HF_ENDPOINT" in caught.value.hint


def test_the_card_says_what_the_store_holds_and_escapes(store: Store, hub: Hub) -> None:
    evil = "x`\n---\nlicense: mit\n<script>alert(1)</script> | [a](b)"
    bad = {**ROLLOUT_PROVENANCE, "student": {**ROLLOUT_PROVENANCE["student"], "name": evil}}
    commit_rollouts(store, 5, name="evil", provenance=bad)
    with pytest.raises(ConfigError, match="no license identifier"):
        push(store, license_id="mit\nx: y")
    assert REPO not in hub.repos
    with pytest.raises(StoreError, match="must be one of") as caught:
        push(store, license_id="no-such-license")
    assert "values that the Hub accepts" in caught.value.hint
    assert hub.uploads == 0, "the card is checked before segments are sent"
    push(store, license_id="cc-by-4.0")
    text = hub.head(REPO)["README.md"].decode()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["size_categories"] == ["n<1K"]
    assert header["viewer"] is False
    positions = sum(s.counts["P"] for s in store.head().segments if s.kind == "rollout")
    assert f"| response positions | {positions:,} |" in text
    assert f"`{store.head().sha256}`" in text
    assert f"logitcask train --model STUDENT --store {URL} --snapshot 3 --rollouts evil" in text
    # One line, one code span: nothing in it is markup.
    (line,) = (line for line in text.splitlines() if "script" in line)
    assert "`x --- license: mit <script>alert(1)</script> | [a](b)`" in line
    assert line.count("`") % 2 == 0


def test_an_edited_card_is_kept(store: Store, hub: Hub) -> None:
    assert push(store, license_id="mit").card == "written"
    commit_rollouts(store, 3)
    assert push(store).card == "written"
    text = hub.head(REPO)["README.md"]
    assert b"license: mit" in text, "a later push keeps the license"
    edited = text.replace(b"# set", b"# My set")
    hub.commit(REPO, {**hub.head(REPO), "README.md": edited})
    commit_rollouts(store, 4)
    assert push(store).card == "kept"
    assert hub.head(REPO)["README.md"] == edited
    assert not card.is_ours("# by hand")


@pytest.mark.parametrize(
    ("sequences", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9 - 1, "100M<n<1B"), (10**9, "1B<n<10B")],
)
def test_size_categories(sequences: int, name: str) -> None:
    assert card.size_category(sequences) == name
