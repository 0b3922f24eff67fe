"""Texts and conversations as ids: where prompt and response meet, and turns that do not count."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from logitcask.engine.errors import PromptError
from logitcask.engine.exchange.files import Files
from tests.engine.tiny import EOS, make_tokenizer

A, B, AB, END = range(4)


def merging(*, spaced: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has one token for "ab"; spaced: it writes a space between tokens."""
    raw = Tokenizer(models.BPE(vocab={"a": A, "b": B, "ab": AB, "</s>": END}, merges=[("a", "b")]))
    if not spaced:
        raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def test_a_prompt_that_ends_within_a_token_is_tokenized_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "ba", "completion": "bab"}))
    (found,) = Files([file], "text", merging(spaced=False), [END])()
    assert (found.prompt, found.response) == ((B, A), (B, AB, END)), "as a rollout's prompt is"
    with pytest.raises(PromptError, match="line 1") as caught:
        list(Files([file], "text", merging(spaced=True), [END])())
    assert "another text for the two apart" in caught.value.cause


def test_turns_after_the_last_assistant_change_nothing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    # Like templates of reasoning models: the turn after the last user's is written otherwise.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if loop.last and m.role == 'assistant' %}so {% endif %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "ok"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": turns[:n]}) + "\n" for n in (2, 3)))
    whole, cut = Files([file], "text", tokenizer, [EOS])()
    assert tokenizer.decode(whole.response) == "so 7\n"
    assert (cut.prompt, cut.response, cut.mask) == (whole.prompt, whole.response, whole.mask)
