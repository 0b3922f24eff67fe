"""Who a served teacher is, and what is refused when it is somebody else."""

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


def test_a_url_is_a_server_and_a_folder_is_none() -> None:
    assert urls_of("http://a:8000/, https://b") == ["http://a:8000", "https://b"]
    assert not is_remote("Qwen/Qwen3-4B")
    assert not is_remote("./http:")
    with pytest.raises(ConfigError, match="'b:8000' among the servers"):
        urls_of("http://a:8000,b:8000")


def test_who_is_served_is_its_source_and_its_revision(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "teacher")
    told: dict[str, Any] = {"tokenizer": str(folder), "chat_template": True}
    ref = remote_model_ref("big", "org/big", revision="abc", **told)
    assert ref.name == "big"
    assert ref.n_vocab == N_VOCAB
    assert ref.stop_ids == (EOS,)
    # The name that an operator gave it is no part of it; what is loaded is.
    assert remote_model_ref("other", "org/big", revision="abc", **told).digest == ref.digest
    assert remote_model_ref("big", "org/big", revision="abe", **told).digest != ref.digest
    assert remote_model_ref("big", "org/huge", revision="abc", **told).digest != ref.digest


def test_a_root_that_is_a_folder_here_needs_no_tokenizer_and_another_does(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "teacher")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # a server's weights are elsewhere
    assert remote_model_ref("big", str(folder), chat_template=False).path == folder
    with pytest.raises(ModelError, match="the tokenizer of 'big'") as caught:
        remote_model_ref("big", "/models/on another machine", chat_template=False)
    assert "--tokenizer" in caught.value.hint


def test_a_declared_revision_is_compared_where_one_is_declared() -> None:
    check_declared("abc", "rev=abc;tok=1")
    check_declared("abc", "vllm-0.32.0-12345678")
    check_declared("", "rev=abc")
    with pytest.raises(IdentityError, match="declares revision 'abe', and 'abc'"):
        check_declared("abc", "tok=1;rev=abe")


def test_another_tokenizer_map_is_refused_at_the_first_id_that_differs(tmp_path: Path) -> None:
    ref = remote_model_ref("big", str(save_folder(tmp_path / "a")), chat_template=False)

    def of(tokenizer: Any) -> Any:
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    assert check_tokenizer(ref, of(load_tokenizer(ref.path)))
    assert not check_tokenizer(ref, lambda text: None)
    swapped = make_tokenizer(characters=CHARACTERS[::-1])
    with pytest.raises(IdentityError, match=r"token \d+ is id \d+ there and id \d+ here"):
        check_tokenizer(ref, of(swapped))
    with pytest.raises(IdentityError, match="is none there"):
        check_tokenizer(ref, lambda text: of(load_tokenizer(ref.path))(text)[:5])
