"""Texts of single ids: spaces are kept, and a part of a character is shown as its bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitcask.engine.errors import IdentityError
from logitcask.engine.models.identity import tokenizer_digest
from logitcask.engine.report.viewer.data import viewer_data
from logitcask.engine.report.viewer.sources import Source
from logitcask.engine.report.viewer.texts import TokenTexts, token_texts
from logitcask.engine.store import Store
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_store, make_unit
from tests.engine.report.viewer.unpack import unpack
from tests.engine.tiny import make_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE without merges: 'é' and a smile take two and four tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def pieces() -> PreTrainedTokenizerFast:
    """Make pieces of SentencePiece: a word after a space, bytes."""
    vocab = {"<unk>": 0, "\u2581the": 1, "the": 2, "<0xF0>": 3, "<0x41>": 4, "\u2581": 5}
    words = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    words.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_parts_of_characters_are_bytes_and_whole_ones_are_text() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a é\n\U0001f600")["input_ids"]
    for each in (tokenizer, tokenizer.backend_tokenizer):
        assert TokenTexts(each).of(ids) == [
            *(("a", ""), (" ", ""), ("", "C3"), ("", "A9"), ("\n", "")),
            *(("", "F0"), ("", "9F"), ("", "98"), ("", "80")),
        ]


def test_spaces_at_the_beginning_of_a_piece_are_kept() -> None:
    for each in (pieces(), pieces().backend_tokenizer):
        assert TokenTexts(each).of([1, 2, 3, 4, 5]) == [
            *((" the", ""), ("the", ""), ("", "F0"), ("A", ""), (" ", "")),
        ]


def test_ids_without_a_text_have_none() -> None:
    assert TokenTexts().of([7, 7]) == [(None, ""), (None, "")]
    for each in (make_tokenizer(), make_tokenizer().backend_tokenizer):
        assert TokenTexts(each).of([3, 4, 500]) == [("\n", ""), (" ", ""), (None, "")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def store_of(path: Path, student: Path) -> Store:
    model = ModelRef(
        name=str(student),
        path=student,
        revision="",
        stop_ids=(1,),
        version=0,
        base_weights="sha256:" + "1" * 64,
        digest="sha256:" + "0" * 64,
        tokenizer_digest=tokenizer_digest(make_tokenizer()),
        template_digest="",
        n_vocab=99,
    )
    return make_store(path / "s", [make_unit(0, lengths=[4] * 6)], student=model)


def test_text_is_by_the_recorded_student_or_a_folder_with_its_tokenizer(
    tmp_path: Path, folder: Path
) -> None:
    store = store_of(tmp_path, folder)
    source = Source(name="run", store=store, snapshot=store.head())
    header, columns = unpack(viewer_data([source]))
    ids = make_tokenizer().convert_ids_to_tokens(columns["text_id"].tolist())
    assert header["texts"] == ids
    moved = folder.rename(tmp_path / "run")
    gone = viewer_data([source])
    assert set(unpack(gone)[0]["texts"]) == {None}
    assert "ids stand for texts" in gone["notes"][-1]
    # The file is enough: without its configuration transformers would not load it.
    (moved / "tokenizer_config.json").write_text("no JSON")
    found = token_texts(replace(source, folders=(str(moved),)), "main")
    assert (found.note, found.of([4])) == ("", [(" ", "")])


def test_another_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    store = store_of(tmp_path, folder)
    byte_level().save_pretrained(tmp_path / "other")
    source = Source(name="run", store=store, snapshot=store.head())
    with pytest.raises(IdentityError, match="is not that of these rollouts"):
        viewer_data([source], tokenizer=str(tmp_path / "other"))
