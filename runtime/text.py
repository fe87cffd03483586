"""Prompts to token ids and token ids back to text, with `tokenizers` and `jinja2` only."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.streaming import BYTES, StreamDecoder

Message = Mapping[str, Any]
"""{"role": str, "content": str or a list of {"type": "image"} and {"type": "text", "text": str}}"""


TEMPLATE = "chat_template.jinja"
TEMPLATE_CONFIGS = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Where older checkpoints keep the template, under `chat_template`."""


class Template:
    """A checkpoint's chat template: messages to the text of a prompt, as `apply_chat_template` of transformers does.

    Templates are programs from the checkpoint; they run in jinja2's sandbox.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile a template.

        Args:
            source: The template.
            special_tokens: Variables such as `bos_token` and `eos_token`.

        Raises:
            BundleError: The template is not valid.
        """
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(f"the chat template is not valid: line {error.lineno}: {_one_line(error)}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "Template":
        """Read the template of a bundle or checkpoint.

        Args:
            folder: Holds `chat_template.jinja`, or a `chat_template` in `chat_template.json`,
                `processor_config.json` or `tokenizer_config.json`; the first found counts. Special tokens are those
                of `tokenizer_config.json`.

        Raises:
            BundleError: There is no template, or a file cannot be read.
        """
        special_tokens = _special_tokens(_read_json(folder / "tokenizer_config.json"))
        source = find_template(folder)
        if source is None:
            raise BundleError(f"{folder} holds no chat template ({TEMPLATE})")
        return cls(source, special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Write the prompt for a conversation.

        Args:
            messages: The conversation, oldest message first; a content that is a string becomes one text part.
            add_generation_prompt: Whether the text ends where the assistant's answer begins.

        Returns:
            The prompt, with one image placeholder for each image part.

        Raises:
            InputError: A message is malformed, or the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=[_with_parts(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except InputError:
            raise
        except Exception as error:  # A template is a program: it can fail in any way.
            raise InputError(f"the chat template refuses this conversation: {_one_line(error)}") from error


class TextTokenizer:
    """The checkpoint's tokenizer, as `tokenizer.json` describes it."""

    def __init__(self, tokenizer: Tokenizer, bos_token: str | None = None) -> None:
        """Wrap a tokenizer; its padding and truncation are switched off.

        Args:
            tokenizer: The tokenizer.
            bos_token: The token that begins a sequence, if a template may write it into the prompt.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.bos_token = bos_token
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.byte_ids = frozenset(found for token in BYTES if (found := tokenizer.token_to_id(token)) is not None)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """Read `tokenizer.json`, and the name of the first token from `tokenizer_config.json`.

        Raises:
            BundleError: A file is missing or cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path} is missing")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception.
            raise BundleError(f"{path} cannot be read: {_one_line(error)}") from error
        return cls(tokenizer, _special_tokens(_read_json(folder / "tokenizer_config.json")).get("bos_token"))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds to a sequence.

        None are added to a text that already begins with the first token, so it never stands there twice: so does
        `processor.apply_chat_template(tokenize=True)` of transformers (whereas `processor(text=...)` doubles it).

        Raises:
            InputError: The text holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid Unicode: character {error.start} is a lone surrogate") from error
        begun = self.bos_token is not None and text.startswith(self.bos_token)
        return self.tokenizer.encode(text, add_special_tokens=not begun).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self) -> StreamDecoder:
        """A decoder for one answer's tokens, one at a time."""
        return StreamDecoder(self)


def find_template(folder: Path) -> str | None:
    """Return the source of a folder's chat template, from the first of the files that may hold one.

    Raises:
        BundleError: A file cannot be read.
    """
    if (folder / TEMPLATE).is_file():
        return _read_text(folder / TEMPLATE)
    found = (_default_template(_read_json(folder / name)) for name in TEMPLATE_CONFIGS)
    return next((source for source in found if source is not None), None)


def split_on_image(ids: Sequence[int], image_token_id: int) -> list[list[int]]:
    """Cut a prompt where images go.

    Args:
        ids: Token ids with one image token for each image.
        image_token_id: The image token.

    Returns:
        The segments of text between the images: one more than there are image tokens, and possibly empty.
    """
    segments: list[list[int]] = [[]]
    for token_id in ids:
        if token_id == image_token_id:
            segments.append([])
        else:
            segments[-1].append(token_id)
    return segments


def check_image_tokens(ids: Sequence[int], image_token_id: int, images: int, raw: str | None = None) -> None:
    """Make sure that a prompt has a place for every image.

    Args:
        ids: Token ids of the whole prompt.
        image_token_id: The image token.
        images: How many images are given with the prompt.
        raw: The image token's text, where the user writes it; None where a template does.

    Raises:
        InputError: The prompt has more or fewer image tokens than there are images.
    """
    found = list(ids).count(image_token_id)
    if found == images:
        return
    way_out = (
        "leave the image token out of the text, because the chat template writes one for each image"
        if found > images
        else "the chat template drops images, or the prompt was cut"
    )
    if raw is not None:
        way_out = f"write {raw} once for each image, where it goes"
    raise InputError(f"the prompt has {found} image tokens for {images} images: {way_out}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks the assistant's text for training, and here shows it."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The names and whitespace rules that chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


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


def _with_parts(message: Message) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(message.get("role"), str) or not isinstance(content, list):
        raise InputError(f"a message needs a role and a content (a text or a list of parts), not {dict(message)!r}")
    return {**message, "content": content}


def _default_template(config: Mapping[str, Any]) -> str | None:
    """The `chat_template` of a configuration: a string, or a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries such as `bos_token`, whose values are a string or an object with its `content`."""
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in contents.items() if name.endswith("_token") and isinstance(value, str)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {_one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise BundleError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object")
    return data


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
