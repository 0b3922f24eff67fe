"""Chat templates: conversations -> text, each rendering bounded in time and size.

A template is a program of the model's author. It runs in a child process with limits, because
nothing inside one process stops it everywhere: a counter in Jinja's sandbox and a signal handler
both wait for one long operation of C code, such as `2 ** 10**9`, `'x' * 10**12` or a filter with a
large argument. The child is a fork: it holds the tokenizer already, costs some 20 ms for a file and
0.1 ms for a prompt.
"""

import datetime
import gc
import json
import math
import os
import resource
import signal
import socket
import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from logitcask.engine.errors import ModelError

CPU_SECONDS = 10
"""CPU seconds of one rendering, at most; a usual one takes a millisecond."""
WALL_SECONDS = 120
"""Seconds of one rendering, at most: for a child that waits instead of computing."""
MEMORY_BYTES = 1 << 28
"""Memory of all renderings of a file, at most, in addition to that of the parent process."""
MAX_TEXT = 1 << 22
"""Characters of a rendered prompt, at most."""

TODAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""The date for templates that print it. With the real one, a run resumed after midnight would have
other prompts."""
DATE_PARTS = ("%Y", "%y", "%m", "%-m", "%d", "%-d", "%b", "%B", "%a", "%A", "%j")
TIME_PARTS = ("%H", "%I", "%p", "%M", "%S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """Rules by which prompts become token ids, the same for all prompts of a set of rollouts."""

    chat_template: bool
    """True renders conversations by the chat template; False takes texts as they are."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template; a line's own override them."""
    drop_last_assistant: bool = False
    """Leave out an assistant turn at the end of a conversation."""
    system_prompt: str = ""
    """System turn of the prompts that have none of their own; empty = none."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the prompts were read: Source.record; {} for a JSONL file with our keys."""

    def record(self) -> dict[str, Any]:
        """Return the provenance of rollouts; keys are left out at their default."""
        return {
            "chat_template": self.chat_template,
            **(
                {"chat_template_kwargs": dict(self.chat_template_kwargs)}
                if self.chat_template_kwargs
                else {}
            ),
            **({"drop_last_assistant": True} if self.drop_last_assistant else {}),
            **({"system_prompt": self.system_prompt} if self.system_prompt else {}),
            **({"source": dict(self.source)} if self.source else {}),
        }


class TemplateError(Exception):
    """A template refuses its input, or fails on it."""


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Render one conversation; raises as Renderer does."""
    with closing(Renderer(tokenizer)) as renderer:
        return renderer.render(messages)


class Renderer:
    """The chat template of a tokenizer in a child process, which the first rendering starts.

    Raises ModelError for a tokenizer without a template, and for a template that exceeds a limit.
    """

    def __init__(self, tokenizer: Any) -> None:
        name = tokenizer.name_or_path or "this model"
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {name} has no chat template, and prompts are to be rendered "
                "with one",
                hint="turn the chat template off (prompts are then literal), or use a chat model",
            )
        self._tokenizer, self._of = tokenizer, f"the chat template of {name}"
        self._child: int | None = None

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._end()

    def render(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        """Render a conversation, with the beginning of the response.

        arguments: tools, documents and variables of the template. Raises TemplateError for one that
        the template refuses.
        """
        if self._child is None:
            self._start()
        try:
            self._stream.write(json.dumps({"messages": messages, **arguments}).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline()
        except TimeoutError:
            self._fail(f"does not answer within {WALL_SECONDS} seconds")
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            self._fail()
        kind, text = json.loads(line)
        if kind == "limit":
            self._fail(text)
        if kind == "error":
            raise TemplateError(text)
        return str(text)

    def refusal(self, names: Iterable[str], *, variables: bool) -> str:
        """Return the reason why the template cannot take arguments of these names, or "".

        variables: False for tools and documents, which no variable may be. An argument that no
        template names would have no effect.
        """
        for name in names:
            own = signature(self._tokenizer.apply_chat_template).parameters
            if variables and (name in own or name == "messages"):
                return f"{name!r} is no variable of a chat template"
            if name not in self._names:
                return f"the chat template reads no {name!r:.80}, so it would have no effect"
        return ""

    @cached_property
    def _names(self) -> set[str]:
        from jinja2 import Environment, TemplateSyntaxError

        templates = self._tokenizer.chat_template
        texts = templates.values() if isinstance(templates, dict) else [templates]
        # The lexer knows no tags, so it also reads those of extensions, and it evaluates nothing.
        lexer = Environment()
        try:
            return {value for text in texts for _, kind, value in lexer.lex(text) if kind == "name"}
        except TemplateSyntaxError as error:
            raise ModelError(
                f"{self._of} cannot be read: {error}",
                hint="repair the template, or turn the chat template off",
            ) from error

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # Python warns of a fork in a process with threads. The child runs Python code alone,
            # and one that waits for a lock ends by WALL_SECONDS.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._child = os.fork()
            except OSError as error:
                ours.close()
                theirs.close()
                raise ModelError(
                    f"{self._of} cannot run in a process of its own: {error.strerror}",
                    hint="allow more processes or memory, or turn the chat template off",
                ) from error
        if not self._child:
            try:
                ours.close()
                _serve(self._tokenizer, theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(WALL_SECONDS)
        self._socket, self._stream = ours, ours.makefile("rwb")

    def _end(self) -> int:
        """End the child, and return its status."""
        assert self._child is not None, "_start"
        child, self._child = self._child, None
        os.kill(child, signal.SIGKILL)  # without effect on the status of one that has ended
        self._socket.close()
        with suppress(BrokenPipeError, ConnectionResetError):  # a request that it has not read
            self._stream.close()
        return os.waitpid(child, 0)[1]

    def _fail(self, cause: str = "") -> NoReturn:
        status = self._end()
        if not cause:
            spent = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            cause = (
                f"does not end within {CPU_SECONDS} s of CPU time"
                if spent
                else f"ended its process with status {os.waitstatus_to_exitcode(status)}"
            )
        raise ModelError(
            f"{self._of} {cause}",
            hint="repair the template, or turn the chat template off",
        )


def _serve(tokenizer: Any, channel: socket.socket) -> None:
    """Answer each line of a channel with a line, in the child, until the parent closes it."""
    # The parent reports an interrupt, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a collection would copy all pages of the parent
    _limit(resource.RLIMIT_CORE, 0)
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere only time and the length of the text are bounded
        pages = int(status.read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES)
    with channel.makefile("rwb") as stream:
        for line in stream:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            # Also ends a child that outlives its parent.
            spent = math.ceil(usage.ru_utime + usage.ru_stime)
            _limit(resource.RLIMIT_CPU, spent + CPU_SECONDS)
            stream.write(json.dumps(_answer(tokenizer, json.loads(line))).encode() + b"\n")
            stream.flush()


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _answer(tokenizer: Any, request: dict[str, Any]) -> tuple[str, str]:
    """Return ("text", rendering), ("error", its cause) or ("limit", the limit)."""
    try:
        template = tokenizer.get_chat_template(None, request.get("tools"))
        if "strftime_now" in template:
            template = fixed_clock() + template
        text: str = tokenizer.apply_chat_template(
            request.pop("messages"),
            chat_template=template,
            tokenize=False,
            **{
                "add_generation_prompt": True,
                "date_string": TODAY.strftime("%d %b %Y"),
                **request,
            },
        )
    except MemoryError:
        return "limit", f"needs more than {MEMORY_BYTES >> 20} MiB"
    # A template is a program of the model's author: it may raise any exception.
    except Exception as error:
        return "error", f"{type(error).__name__}: {str(error)[:300]}"
    if len(text) > MAX_TEXT:
        return "limit", f"makes a text of {len(text)} characters, more than {MAX_TEXT}"
    return "text", text


def fixed_clock() -> str:
    """Return Jinja code that replaces strftime_now by a macro for TODAY.

    In Jinja because transformers passes no functions to a template; the empty expression at the end
    keeps Jinja from trimming a newline at the beginning of the template.
    """
    parts = "".join(
        f"|replace('{part}', '{TODAY.strftime(part)}')" for part in DATE_PARTS + TIME_PARTS
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}{{{{ '' }}}}"
