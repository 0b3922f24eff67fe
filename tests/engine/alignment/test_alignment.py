"""Bytes of ids, ids of bytes, and the spans of two tokenizations."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from logitcask.engine.alignment.compare import compare_tokenizers
from logitcask.engine.alignment.encode import ByteEncoder, utf8_runs
from logitcask.engine.alignment.spans import align
from logitcask.engine.alignment.token_bytes import TokenBytes, _table, token_bytes
from logitcask.engine.errors import IncompleteError, ModelError, UnitError
from tests.engine.alignment.small_tokenizers import CORPUS, MAKERS, tokenizer_of

ENCODERS: dict[str, ByteEncoder] = {}


def encoder_of(kind: str) -> ByteEncoder:
    if kind not in ENCODERS:
        ENCODERS[kind] = ByteEncoder(tokenizer_of(kind))
    return ENCODERS[kind]


def table(*pieces: bytes | None) -> TokenBytes:
    return _table(pieces, b"")


def rows(a: TokenBytes, ids_a: list[int], b: TokenBytes, ids_b: list[int], **more: Any) -> Any:
    return align(a, np.array(ids_a), b, np.array(ids_b), **more).rows.tolist()


# --- spans: the hand-worked cases of reference O1, O2, O5, O6 ---


def test_the_finest_spans() -> None:
    a, b = table(b"ab", b"c"), table(b"a", b"b", b"c")
    assert rows(a, [0, 1], b, [0, 1, 2]) == [[0, 1, 0, 2], [1, 2, 2, 3]]
    found = align(a, np.array([0, 1]), b, np.array([0, 1, 2]))
    log_p, log_q = np.array([-0.5, -0.3]), np.array([-0.2, -0.4, -0.1])
    assert found.sums(log_p, 0) == pytest.approx([-0.5, -0.3])
    assert found.sums(log_q, 1) == pytest.approx([-0.6, -0.1])


def test_a_character_that_both_split_is_one_span() -> None:
    a = table(b"\xf0\x9f", b"\xa4\x96", b"x")
    b = table(b"\xf0", b"\x9f\xa4", b"\x96", b"x")
    assert rows(a, [0, 1, 2], b, [0, 1, 2, 3]) == [[0, 2, 0, 3], [2, 3, 3, 4]]


def test_control_tokens_pair_by_their_role_at_the_same_byte() -> None:
    a, b = table(b"ok", None), table(b"ok", None)
    assert rows(a, [0, 1], b, [0, 1], roles={1: 1}) == [[0, 1, 0, 1], [1, 2, 1, 2]]
    assert rows(a, [0, 1], b, [0, 1]) == [[0, 1, 0, 1]]
    assert rows(a, [1, 0], b, [0, 1], roles={1: 1}) == [[1, 2, 0, 1]]


def test_a_span_with_a_control_token_inside_is_left_out() -> None:
    a, b = table(b"a", b"b", None), table(b"ab", b"c")
    found = align(a, np.array([0, 2, 1]), b, np.array([0]))
    assert (found.rows.tolist(), found.bytes) == ([], 0)


def test_texts_of_other_lengths_are_refused() -> None:
    a = table(b"a", b"ab")
    with pytest.raises(UnitError, match="spell 1 and 2 bytes"):
        rows(a, [0], a, [1])


@given(st.data())
def test_spans_tile_both_sides_and_are_the_finest(data: st.DataObject) -> None:
    text = data.draw(st.binary(min_size=1, max_size=30))
    sides = []
    for _ in range(2):
        cuts = data.draw(st.sets(st.integers(1, len(text)), max_size=len(text)))
        ends = [0, *sorted(cuts | {len(text)})]
        pieces = [text[i:j] for i, j in pairwise(ends)]
        known = sorted(set(pieces))
        sides.append((table(*known), [known.index(p) for p in pieces], set(ends)))
    (a, ids_a, ends_a), (b, ids_b, ends_b) = sides
    found = align(a, np.array(ids_a), b, np.array(ids_b))
    spans = found.rows.tolist()
    assert found.bytes == len(text)
    assert (spans[0][0], spans[0][2]) == (0, 0)
    assert (spans[-1][1], spans[-1][3]) == (len(ids_a), len(ids_b))
    for (_, a1, _, b1), (a0, _, b0, _) in pairwise(spans):
        assert (a1, b1) == (a0, b0)
    for a0, a1, b0, b1 in spans:
        assert a.spell(ids_a[a0:a1]) == b.spell(ids_b[b0:b1]) != b""
    assert len(spans) == len(ends_a & ends_b) - 1
    turned = [[b0, b1, a0, a1] for a0, a1, b0, b1 in spans]
    assert rows(b, ids_b, a, ids_a) == turned
    assert rows(a, ids_a, a, ids_a) == [[i, i + 1, i, i + 1] for i in range(len(ids_a))]


# --- tables ---


@pytest.mark.parametrize("kind", MAKERS)
def test_the_table_spells_as_the_tokenizer_decodes(kind: str) -> None:
    tokenizer, found = tokenizer_of(kind), encoder_of(kind).table
    text = "the student reads 12 + 30"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.spell(ids) == (found.lead + text.encode() if kind != "nfc" else text.encode())
    assert found.lead == (b" " if kind in ("prefixed", "unigram", "wordpiece") else b"")
    assert found.pieces[tokenizer.eos_token_id] is None
    assert found.pieces[tokenizer.convert_tokens_to_ids("<think>")] == (
        b" <think>" if kind == "wordpiece" else b"<think>"
    )
    assert token_bytes(tokenizer).digest == found.digest


def test_equal_bytes_have_equal_digests() -> None:
    digests = {encoder_of(kind).table.digest for kind in MAKERS if kind != "nfc"}
    assert len(digests) == len(MAKERS) - 1
    assert encoder_of("nfc").table.digest != encoder_of("sentencepiece").table.digest


def test_a_decoder_of_another_kind_is_refused() -> None:
    plain = Tokenizer(models.BPE({"a": 0, "b</w>": 1}, []))
    for decoder, cause in (
        (None, "has no decoder"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
    ):
        if decoder is not None:
            plain.decoder = decoder
        fast: Any = type("Fast", (), {"backend_tokenizer": plain})()
        with pytest.raises(ModelError, match=cause):
            token_bytes(fast)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        token_bytes(object())


def test_a_table_that_the_decoder_contradicts_is_refused() -> None:
    fast = tokenizer_of("byte-level").__class__(tokenizer_object=MAKERS["byte-level"]())
    # An added token whose text is one character of the map of bytes: the decoder takes it for E9.
    fast.add_tokens(["é"])
    with pytest.raises(ModelError, match="decode to other text"):
        token_bytes(fast)


# --- ids of bytes ---

BYTES = st.one_of(
    st.binary(max_size=20),
    st.text(st.sampled_from("ab 12\té\u0301漢🙂\u200d▁Ġ\x00\n"), max_size=20).map(str.encode),
    st.lists(st.sampled_from(["</s>", "<think>", "<0x41>", "the ", "e\u0301"]), max_size=5).map(
        lambda parts: "".join(parts).encode()
    ),
)


@pytest.mark.parametrize("kind", [k for k in MAKERS if k not in ("wordpiece", "unigram")])
@given(text=BYTES)
def test_ids_spell_the_bytes_or_are_refused(kind: str, text: bytes) -> None:
    encoder = encoder_of(kind)
    chars = set(text.decode(errors="replace").replace("<think>", ""))
    if kind == "characters" and not chars <= set("".join(CORPUS)):
        with pytest.raises(UnitError):
            encoder.encode(text)
        return
    found = encoder.encode(text)
    spelled = encoder.table.spell(found.ids.tolist())
    assert spelled == encoder.table.lead[: found.lead] + text
    assert tokenizer_of(kind).eos_token_id not in found.ids


def test_a_text_that_the_tokenizer_normalises_is_patched() -> None:
    composed, split = "é".encode(), "e\u0301".encode()
    encoder = encoder_of("nfc")
    assert not encoder.encode(composed).patched.any()
    found = encoder.encode(b"x " + split)
    assert found.patched.any()
    assert encoder.table.spell(found.ids.tolist()) == b"x " + split


def test_bytes_that_are_no_characters_have_ids_too() -> None:
    text = "🙂".encode()[:3]
    assert list(utf8_runs(b"ab" + text)) == [(True, b"ab"), (False, text)]
    found = encoder_of("sentencepiece").encode(b"ab" + text)
    assert encoder_of("sentencepiece").table.spell(found.ids.tolist()) == b"ab" + text


def test_what_cannot_be_spelled_is_refused_by_name() -> None:
    with pytest.raises(UnitError, match=r"row 3: no ids of this tokenizer spell b'\\xff'"):
        encoder_of("characters").encode(b"the \xff", "row 3")
    with pytest.raises(UnitError, match="spell '☃'"):
        encoder_of("characters").encode("the ☃".encode())
    # WordPiece writes a space before each word, which this text has not everywhere.
    with pytest.raises(UnitError, match="no ids"):
        encoder_of("wordpiece").encode(b"return x+12")


@pytest.mark.parametrize("kind", ["byte-level", "nfc", "sentencepiece", "prefixed"])
@given(before=BYTES, text=BYTES)
def test_a_continuation_has_all_bytes_and_no_lead(kind: str, before: bytes, text: bytes) -> None:
    encoder = encoder_of(kind)
    found = encoder.encode_continuation(before, text)
    assert encoder.table.spell(found.ids.tolist()) == text
    assert found.lead == 0
    if not found.patched.any():
        whole = encoder.encode(before + text).ids.tolist()
        assert whole[len(whole) - len(found.ids) :] == found.ids.tolist()


def test_a_continuation_is_as_in_the_whole_text_or_patched() -> None:
    for kind in ("byte-level", "sentencepiece", "prefixed"):
        encoder = encoder_of(kind)
        whole = encoder.encode(b"the student reads").ids.tolist()
        found = encoder.encode_continuation(b"the student", b" reads")
        assert found.ids.tolist() == whole[-len(found.ids) :]
        assert not found.patched.any()
        # A token of the whole text has bytes of both sides of this seam.
        cut = encoder.encode_continuation(b"the student", b"the"[1:])
        assert encoder.table.spell(cut.ids.tolist()) == b"he"
        inside = encoder.encode_continuation(b"the stud", b"ent reads")
        assert encoder.table.spell(inside.ids.tolist()) == b"ent reads"
        assert inside.patched.tolist() == [True] + [False] * (len(inside.ids) - 1)
    # Without anything before it, a text would begin with a space.
    found = encoder_of("prefixed").encode_continuation(b"", b"reads")
    assert encoder_of("prefixed").table.spell(found.ids.tolist()) == b"reads"


def test_only_words_that_are_divided_are_patched() -> None:
    encoder = encoder_of("nfc")
    text = "the student e\u0301 reads the text".encode()
    found = encoder.encode(text)
    patched = [encoder.table.pieces[i] for i in found.ids[found.patched].tolist()]
    assert b"".join(each or b"" for each in patched) == " e\u0301".encode()
    # Words of a tokenizer that begins each text with a space are tokens behind broken bytes too.
    prefixed = encoder_of("prefixed")
    found = prefixed.encode(b"\xff the student")
    assert found.patched.tolist() == [True] + [False] * (len(found.ids) - 1)
    assert len(found.ids) < 6


# --- comparison ---


def test_a_comparison_counts_by_hand() -> None:
    texts = [("1", b"12 + 30 = 42"), ("2", b""), ("3", b"\xff")]
    found = compare_tokenizers(encoder_of("characters"), encoder_of("sentencepiece"), texts)
    theirs = len(encoder_of("sentencepiece").encode(texts[0][1]).ids)
    assert (found.texts, found.bytes, found.student_tokens) == (1, 12, 12)
    assert (found.teacher_tokens, found.spans) == (theirs, theirs)
    assert [each.text for each in found.refused] == ["3"]
    assert not found.same_bytes
    same = compare_tokenizers(encoder_of("nfc"), encoder_of("nfc"), texts[:1])
    assert (same.same_bytes, same.share_one_to_one, same.largest_span) == (True, 1.0, 1)
    with pytest.raises(IncompleteError, match="no text that both"):
        compare_tokenizers(encoder_of("characters"), encoder_of("nfc"), texts[1:])
