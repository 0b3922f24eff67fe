"""Identity of a served teacher: URLs, source, revision and tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import ConfigError, IdentityError, ModelError
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.teachers.remote import (
    check_declared,
    check_tokenizer,
    is_remote,
    remote_model_ref,
    urls_of,
)
from tests.engine.tiny import CHARACTERS, EOS, N_VOCAB, make_tokenizer, save_folder


def test_urls_are_remote_and_folders_are_not() -> None:
    assert urls_of("http://a:8000/, https://b") == ["http://a:8000", "https://b"]
    assert not is_remote("Qwen/Qwen3-4B")
    assert not is_remote("./http:")
    with pytest.raises(ConfigError, match="'b:8000' among the servers"):
        urls_of("http://a:8000,b:8000")


def test_the_identity_is_source_and_revision(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "teacher")
    kwargs: dict[str, Any] = {"tokenizer": str(folder), "chat_template": True}
    ref = remote_model_ref("big", "org/big", revision="abc", **kwargs)
    assert ref.name == "big"
    assert ref.n_vocab == N_VOCAB
    assert ref.stop_ids == (EOS,)
    # The served name is no part of the identity; source and revision are.
    assert remote_model_ref("other", "org/big", revision="abc", **kwargs).digest == ref.digest
    assert remote_model_ref("big", "org/big", revision="abe", **kwargs).digest != ref.digest
    assert remote_model_ref("big", "org/huge", revision="abc", **kwargs).digest != ref.digest


def test_a_root_that_is_no_local_folder_needs_a_tokenizer(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "teacher")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # the weights are on the server
    assert remote_model_ref("big", str(folder), chat_template=False).path == folder
    with pytest.raises(ModelError, match="the tokenizer of 'big'") as caught:
        remote_model_ref("big", "/models/on another machine", chat_template=False)
    assert "--tokenizer" in caught.value.hint


def test_a_declared_revision_must_match() -> None:
    check_declared("abc", "rev=abc;tok=1")
    check_declared("abc", "vllm-0.32.0-12345678")
    check_declared("", "rev=abc")
    with pytest.raises(IdentityError, match="declares revision 'abe', and 'abc'"):
        check_declared("abc", "tok=1;rev=abe")


def test_another_tokenizer_map_is_an_error_at_the_first_different_id(tmp_path: Path) -> None:
    ref = remote_model_ref("big", str(save_folder(tmp_path / "a")), chat_template=False)

    def tokenize_with(tokenizer: Any) -> Any:
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    assert check_tokenizer(ref, tokenize_with(load_tokenizer(ref.path)))
    assert not check_tokenizer(ref, lambda text: None)
    swapped = make_tokenizer(characters=CHARACTERS[::-1])
    with pytest.raises(IdentityError, match=r"token \d+ is id \d+ there and id \d+ here"):
        check_tokenizer(ref, tokenize_with(swapped))
    with pytest.raises(IdentityError, match="is none there"):
        check_tokenizer(ref, lambda text: tokenize_with(load_tokenizer(ref.path))(text)[:5])
