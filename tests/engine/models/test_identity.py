"""Digests: what changes them, what does not, and which folders are refused."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models import identity, weights
from tests.engine.models.sharded import write_index
from tests.engine.tiny import make_model, make_tokenizer, save_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "logitcask" / "weights.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


def age(folder: Path) -> None:
    """Make the files a minute old, so that their digests may be cached."""
    for file in folder.glob("*.safetensors"):
        ns = file.stat().st_mtime_ns - 60_000_000_000
        os.utime(file, ns=(ns, ns))


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_digest_is_of_the_value_and_not_of_its_spelling() -> None:
    assert identity.canonical({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}'
    assert identity.digest({"a": 1, "b": 2}) == identity.digest({"b": 2, "a": 1})
    by_sha256sum = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert identity.digest({}) == "sha256:" + by_sha256sum
    with pytest.raises(ValueError, match="Out of range"):
        identity.canonical(float("nan"))


def test_weights_digest_does_not_see_shards_names_order_or_metadata(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    whole = identity.weights_digest(folder)
    names = sorted(tensors, reverse=True)
    shards = tmp_path / "shards"
    shards.mkdir()
    save_file({n: tensors[n] for n in names[:5]}, shards / "b.safetensors", {"made": "by hand"})
    save_file({n: tensors[n] for n in names[5:]}, shards / "a.safetensors")
    write_index(shards, "b.safetensors", "a.safetensors")
    assert identity.weights_digest(shards) == whole


@pytest.mark.parametrize("change", ["bit", "name", "dtype", "shape"])
def test_weights_digest_sees_every_bit_name_dtype_and_shape(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    before = identity.weights_digest(folder)
    name = "model.norm.weight"
    tensor = tensors.pop(name)
    if change == "bit":
        tensor.view(torch.int32)[3] ^= 1
    if change == "dtype":
        tensor = tensor.view(torch.int32)
    if change == "shape":
        tensor = tensor[None]
    tensors["model.norm.other" if change == "name" else name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert identity.weights_digest(folder) != before


def test_a_file_that_has_not_changed_is_not_read_again(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = weights.tensor_digests
    monkeypatch.setattr(
        weights,
        "tensor_digests",
        lambda file, *rest: (reads.append(file.name), real(file, *rest))[1],
    )
    first = identity.weights_digest(folder)
    assert not cache.exists(), "a file of this second may change without a trace"
    age(folder)
    assert [identity.weights_digest(folder) for _ in range(3)] == [first] * 3
    assert reads == ["model.safetensors"] * 2
    save_folder(folder, make_model(seed=1))
    age(folder)
    assert identity.weights_digest(folder) != first


def test_other_weights_with_the_same_size_and_time_are_read(folder: Path, tmp_path: Path) -> None:
    """Replace the file as `cp -p` and `rsync -t` do."""
    age(folder)
    first = identity.weights_digest(folder)
    file = folder / "model.safetensors"
    stat = file.stat()
    shutil.copyfile(save_folder(tmp_path / "b", make_model(seed=1)) / file.name, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert identity.weights_digest(folder) != first


@pytest.mark.parametrize("damage", ["", "[1]", '{"x": 3}', '{"x": {"stamp": [], "tensors": [1]}}'])
def test_a_broken_cache_is_rebuilt(folder: Path, cache: Path, damage: str) -> None:
    age(folder)
    right = identity.weights_digest(folder)
    cache.write_text(damage)
    assert identity.weights_digest(folder) == right
    assert str(folder / "model.safetensors") in json.loads(cache.read_text())


def test_the_cache_forgets_files_that_are_gone(folder: Path, cache: Path, tmp_path: Path) -> None:
    other = save_folder(tmp_path / "other")
    age(other)
    identity.weights_digest(other)
    shutil.rmtree(other)
    age(folder)
    identity.weights_digest(folder)
    assert list(json.loads(cache.read_text())) == [str(folder / "model.safetensors")]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def huge_header(file: Path) -> None:
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def no_header(file: Path) -> None:
    file.write_bytes((4).to_bytes(8, "little") + b"{{{{")


@pytest.mark.parametrize("damage", [cut, huge_header, no_header])
def test_a_damaged_weights_file_is_named(folder: Path, damage: Any) -> None:
    damage(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        identity.weights_digest(folder)


def test_tokenizer_digest_is_of_the_map_from_tokens_to_ids() -> None:
    tokenizer = make_tokenizer()
    digest = identity.tokenizer_digest(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None
    assert identity.tokenizer_digest(tokenizer) == digest
    tokenizer.add_tokens(["<think>"])
    assert identity.tokenizer_digest(tokenizer) != digest
    assert identity.tokenizer_digest(make_tokenizer(characters="ab")) != identity.tokenizer_digest(
        make_tokenizer(characters="ba")
    )


def test_template_digest_is_of_the_rendered_text() -> None:
    tokenizer = make_tokenizer()
    digest = identity.template_digest(tokenizer, True)
    tokenizer.chat_template += "{# a comment #}"
    assert identity.template_digest(tokenizer, True) == digest
    tokenizer.chat_template += "{{ strftime_now('%d %b %Y') }}"
    dated = identity.template_digest(tokenizer, True)
    assert dated != digest
    assert identity.template_digest(tokenizer, True) == dated
    plain = identity.template_digest(tokenizer, False)
    assert plain not in (digest, dated)
    assert plain == identity.template_digest(make_tokenizer(chat_template=False), False)
    with pytest.raises(ModelError, match="has no chat template"):
        identity.template_digest(make_tokenizer(chat_template=False), True)


def test_a_plain_folder_is_version_0_of_its_own_root(folder: Path) -> None:
    ref = identity.model_ref(str(folder), chat_template=True)
    assert ref.base_weights == ref.digest == identity.weights_digest(folder)
    assert (ref.version, ref.revision, ref.path) == (0, "", folder)
    assert (ref.n_vocab, ref.stop_ids) == (99, (1,))


def test_a_trained_student_records_its_root(folder: Path) -> None:
    root, parent = identity.digest("root"), identity.digest("parent")
    identity.write_metadata(
        folder,
        base_weights=root,
        parent=parent,
        version=7,
        pin={"number": 3},
        plan="p",
        objective={},
    )
    metadata = identity.read_metadata(folder)
    assert metadata is not None
    assert metadata["parent"] == parent
    ref = identity.model_ref(str(folder), chat_template=False)
    assert (ref.base_weights, ref.version) == (root, 7)
    assert ref.digest == identity.weights_digest(folder)


def test_other_weights_than_training_saved_are_refused(folder: Path) -> None:
    d = identity.digest(0)
    identity.write_metadata(
        folder, base_weights=d, parent=d, version=1, pin=None, plan=d, objective=None
    )
    identity.model_ref(str(folder), chat_template=False)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"other weights than the trained student"):
        identity.model_ref(str(folder), chat_template=False)


@pytest.mark.parametrize(
    "keys", [{"root": "sha256:x"}, {"version": -1}, {"version": "7"}, {"root": None}]
)
def test_invalid_metadata_is_refused(folder: Path, keys: dict[str, Any]) -> None:
    d = identity.digest(0)
    identity.write_metadata(
        folder, base_weights=d, parent=d, version=1, pin=None, plan=d, objective=None
    )
    edit(folder / identity.METADATA_FILE, **keys)
    with pytest.raises(ModelError, match=r"logitcask\.json is not the metadata"):
        identity.read_metadata(folder)


def test_stop_ids_are_those_of_tokenizer_config_and_generation_config(folder: Path) -> None:
    def stops(**more: Any) -> tuple[int, ...]:
        return identity.model_ref(str(folder), chat_template=False, **more).stop_ids

    edit(folder / "config.json", eos_token_id=[5, 4])
    file = folder / "generation_config.json"
    file.unlink()
    assert stops() == (1, 4, 5)
    ref, tokenizer = identity.model_ref(str(folder), chat_template=False), make_tokenizer()
    assert identity.stop_note(ref, tokenizer) == ""
    for eos, expected in ((50, (1, 4, 5, 50)), ([60, 5], (1, 4, 5, 60)), (None, (1, 4, 5))):
        file.write_text(json.dumps({"eos_token_id": eos, "temperature": math.inf}))
        assert stops() == expected
    file.write_text('{"eos_token_id": [4, 60, 50]}')
    note = f"{folder}: stop ids of generation_config.json: 50 ('N'), 60 ('X')"
    assert identity.stop_note(ref, tokenizer) == note
    assert stops(stop_token_ids=(98, 50, 2)) == (1, 2, 4, 5, 50, 60, 98)
    for beyond in (99, -1):
        with pytest.raises(ConfigError, match=rf"has {beyond}, and the ids of .* in \[0, 99\)"):
            stops(stop_token_ids=(2, beyond))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"eos_token_id": 99}', r"stop ids \['1', '99'\]"),
        ('{"eos_token_id": [true]}', r"stop ids \['1', 'True'\]"),
        ('{"eos_token_id": {"a": 1}}', r"stop ids \['1', .*one is needed, and all in \[0, 99\)"),
        ("[1]", r"generation_config\.json holds no object"),
        ("{", r"generation_config\.json cannot be read"),
        ("[" * 99999, r"generation_config\.json cannot be read"),
        ('{"a": ' + "1" * 5000 + "}", r"generation_config\.json cannot be read"),
        (" " * (1 << 24) + "{}", r"generation_config\.json cannot be read: it is longer than"),
    ],
    ids=lambda value: value[:20],
)
def test_a_damaged_generation_config_is_named(folder: Path, text: str, cause: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=cause):
        identity.vocabulary(folder, identity.read_config(folder), make_tokenizer())


def test_a_padded_head_does_not_widen_the_vocabulary(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "padded", make_model(vocab_size=128))
    assert identity.model_ref(str(folder), chat_template=False).n_vocab == 99


def test_context_length_is_the_configs(folder: Path) -> None:
    assert identity.context_length(folder) == 256
    edit(folder / "config.json", max_position_embeddings=None)
    assert identity.context_length(folder) > 1 << 60
    edit(folder / "config.json", text_config={"max_position_embeddings": 64})
    assert identity.context_length(folder) == 64


def test_contradictions_in_a_folder_are_refused(tmp_path: Path) -> None:
    narrow = save_folder(tmp_path / "narrow", make_model(vocab_size=64))
    with pytest.raises(ModelError, match=r"64 ids \(vocab_size\), its tokenizer 99"):
        identity.model_ref(str(narrow), chat_template=False)
    folder = save_folder(tmp_path / "endless", make_model(eos=None))
    edit(folder / "config.json", eos_token_id=120)
    with pytest.raises(ModelError, match=r"stop ids \['1', '120'\].*\[0, 99\)"):
        identity.model_ref(str(folder), chat_template=False)
    (folder / "config.json").write_text("[")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        identity.model_ref(str(folder), chat_template=False)


def test_a_folder_without_safetensors_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors\n"):
        identity.weights_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, a pickle") as caught:
        identity.weights_digest(tmp_path)
    assert "save_pretrained" in caught.value.hint
    folder = save_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        identity.model_ref(str(folder), chat_template=False)


def test_neither_folder_nor_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"there is no folder \./nowhere, and it is not a hub id"):
        identity.resolve_model("./nowhere")

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"cannot be fetched: LocalEntryNotFoundError: offline\n"):
        identity.resolve_model("someone/model", "main")


def test_a_hub_id_is_pinned_to_the_commit_that_was_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = folder.rename(tmp_path / ("c0ffee" * 6 + "abcd"))
    request: dict[str, Any] = {}

    def fetch(name: str, **keys: Any) -> str:
        request.update(keys, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    ref = identity.model_ref("someone/model", revision="main", chat_template=False)
    assert ref.revision == snapshot.name
    assert (request["name"], request["revision"]) == ("someone/model", "main")
    assert not any("bin" in pattern for pattern in request["allow_patterns"])
