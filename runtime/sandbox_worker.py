"""The process in which a checkpoint's programs run: its chat template, and regular expressions of its tokenizer.

Both can be written to run for ever or to fill the memory, in single calls that nothing in their own process can interrupt. Here
the kernel bounds them. The process is started by `sandbox`, reads a request a line and writes a reply a line, both JSON; it
imports nothing of ours, so that it is there in the time that Jinja's import takes.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # The process is started without site-packages, but for the folders that it needs.

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

SECONDS = {"render": 1, "encode": 2}
"""Of processor time for one request, at least. A template takes a millisecond; reading a tokenizer can take a second."""

MEMORY = 1 << 30
"""Bytes of addresses for the whole process."""

MAX_PROMPT = 1 << 22
"""Characters of a prompt; the longest contexts of 2026 hold a million tokens."""

MAX_MESSAGE = 300

Reply = tuple[str, Any]
"""`text`, `ids`, or what went wrong (`invalid`, `refused`, `size`); and the text, the ids or a message."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks the assistant's text for training, and here shows it."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return the names and whitespace rules that chat templates are written for."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def render(source: str, variables: Mapping[str, Any] | None) -> Reply:
    """Render a template; without variables, only see whether it is valid."""
    try:
        template = _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        return "invalid", f"line {error.lineno}: {_one_line(error)}"
    except MemoryError:
        raise
    except Exception as error:  # Constant expressions are computed here, and parsing is recursive.
        return "invalid", _one_line(error)
    if variables is None:
        return "text", ""
    try:
        text = template.render(variables)
    except MemoryError:
        raise
    except Exception as error:  # A template is a program: it can fail in any way.
        return "refused", _one_line(error)
    return ("text", text) if len(text) <= MAX_PROMPT else ("size", f"writes {len(text)} characters, of {MAX_PROMPT} at most")


@lru_cache(maxsize=1)
def _tokenizer(path: str, changed: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(path: str, changed: int, text: str, special: bool) -> Reply:
    """Tokenise a text with the file `path`, of which `changed` tells versions apart."""
    try:
        ids = _tokenizer(path, changed).encode(text, add_special_tokens=special).ids
    except MemoryError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and for a panic what is none.
        return "refused", _one_line(error)
    return ("ids", ids) if len(ids) <= MAX_PROMPT else ("size", f"makes {len(ids)} tokens, of {MAX_PROMPT} at most")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a prompt does not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error)[:MAX_MESSAGE].split()) or type(error).__name__


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, where the system has it; processor time may go up again."""
    hard = resource.getrlimit(kind)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def serve() -> None:
    """Answer requests until there are no more."""
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    kinds: dict[str, Callable[..., Reply]] = {"render": render, "encode": encode}
    for line in sys.stdin.buffer:
        try:
            kind, *arguments = json.loads(line)
            spent = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(spent.ru_utime + spent.ru_stime) + 1 + SECONDS[kind])
            data = json.dumps(kinds[kind](*arguments))
        except MemoryError:
            data = json.dumps(("size", f"needs more than {MEMORY >> 20} MB of memory"))
        sys.stdout.buffer.write(data.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
