"""Chat templates are stopped: in time, in memory and in the length of their text."""

import os
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from logitcask.engine.errors import ModelError
from logitcask.engine.models.identity import template_digest
from logitcask.engine.prompts import templates
from logitcask.engine.prompts.templates import Renderer, TemplateError, render
from tests.engine.tiny import make_tokenizer

TURNS = [{"role": "user", "content": "x"}]
NEVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x='xxxxxxxx') %}"
    "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
LIMITS = {
    "loops": (NEVER, "does not end within 0 s of CPU time"),
    "one operation": ("{{ 7 ** (10 ** 9) }}", "does not end within 0 s of CPU time"),
    "multiplied": ("{{ 'x' * 10**9 }}", "needs more than 256 MiB"),
    "doubled": (DOUBLED, "needs more than 256 MiB"),
    "a filter": ("{{ 'x'|center(10**9) }}", "needs more than 256 MiB"),
    "replaced": ("{% set n = 'x' * 10**6 %}{{ n|replace('x', n) }}", "needs more than 256 MiB"),
    "long": ("{{ 'x' * 5 * 10**6 }}", "makes a text of 5000000 characters, more than 4194304"),
}


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("template", "cause"), LIMITS.values(), ids=LIMITS.keys())
def test_a_template_without_end_is_stopped(
    monkeypatch: pytest.MonkeyPatch, template: str, cause: str
) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 0)  # the first second is never cut
    for run in (render, lambda tokenizer, _: template_digest(tokenizer, True)):
        with pytest.raises(ModelError) as caught:
            run(tokenizer_with(template), TURNS)
        assert caught.value.cause == f"the chat template of this model {cause}"
        if "CPU" in cause:
            break


def test_a_silent_or_dead_child_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "WALL_SECONDS", 0.2)
    monkeypatch.setattr(templates, "_answer", lambda *_: os.read(os.pipe()[0], 1))
    with pytest.raises(ModelError, match=r"does not answer within 0\.2 seconds"):
        render(make_tokenizer(), TURNS)
    monkeypatch.setattr(templates, "_answer", lambda *_: os._exit(3))
    with pytest.raises(ModelError, match="ended its process with status 3"):
        render(make_tokenizer(), TURNS)


def test_a_system_that_allows_no_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", no_fork)
    with pytest.raises(ModelError, match="a process of its own: Cannot allocate memory"):
        render(make_tokenizer(), TURNS)


def test_a_child_serves_many_prompts_and_goes_on_after_a_refusal() -> None:
    template = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}ok"
    with closing(Renderer(tokenizer_with(template))) as renderer:
        assert renderer.render(TURNS) == "ok"
        child = renderer._child
        with pytest.raises(TemplateError, match="no b"):
            renderer.render([{"role": "user", "content": "b"}])
        assert renderer.render(TURNS) == "ok"
        assert renderer._child == child
    assert child is not None
    with pytest.raises(ProcessLookupError):  # ended, and no zombie
        os.kill(child, 0)


def test_a_thread_renders_too() -> None:
    found = []
    thread = Thread(target=lambda: found.append(render(make_tokenizer(), TURNS)))
    thread.start()
    thread.join()
    assert found == ["user: x\nassistant: "]


def test_a_refusal_is_cut_and_a_template_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(TemplateError) as caught:
        render(tokenizer_with("{{ raise_exception('x' * 999) }}"), TURNS)
    assert len(str(caught.value)) < 320
    with pytest.raises(TemplateError, match="Expected an expression"):
        render(tokenizer_with("{% if %}"), TURNS)
    with pytest.raises(ModelError, match="cannot be read: unexpected char"):
        Renderer(tokenizer_with("{{ 'x")).refusal(["a"], variables=True)
