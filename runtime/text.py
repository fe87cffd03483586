"""Prompts tokenised and answers detokenised, with `tokenizers` and `jinja2` only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.records import LIMIT, load_json, shorten
from leanvlm.runtime.sandbox import sandbox
from leanvlm.runtime.streaming import BYTES, StreamDecoder
from leanvlm.runtime.tokenizer_rules import decodes_safely, encodes_safely, loads_safely

Message = Mapping[str, Any]
"""{"role": str, "content": str or a list of {"type": "image"} and {"type": "text", "text": str}}"""


TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_CONFIGS = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Where older checkpoints keep the template, under `chat_template`."""

MAX_TOKENIZER = 128 << 20
"""Bytes of a tokenizer; published ones, of 262,144 tokens, have 33 MB."""

MAX_PROMPT = 1 << 22
"""Characters of a prompt; the longest contexts of 2026 hold a million tokens."""

ANOTHER_MODELS = "it is another model's; copy or export the bundle again"


class Template:
    """A checkpoint's chat template: messages to the text of a prompt, as `apply_chat_template` of transformers does.

    Templates are programs from the checkpoint; they run in jinja2's sandbox, and that in a process of bounded means.
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
        self._source = source
        self._ask(None)

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
            BundleError: The template takes more time or memory than any conversation needs.
        """
        return self._ask(
            {
                "messages": [_with_parts(message) for message in messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self.special_tokens,
            }
        )

    def _ask(self, variables: Mapping[str, Any] | None) -> str:
        kind, value = sandbox().ask("render", self._source, variables)
        if kind == "text":
            return str(value)
        if kind == "refused":
            raise InputError(f"the chat template refuses this conversation: {value}")
        raise BundleError(f"the chat template is not valid: {value}" if kind == "invalid" else f"the chat template {value}")


class TextTokenizer:
    """The checkpoint's tokenizer, as `tokenizer.json` describes it."""

    def __init__(self, tokenizer: Tokenizer, bos_token: str | None = None, path: Path | None = None) -> None:
        """Wrap a tokenizer; its padding and truncation are switched off.

        Args:
            tokenizer: The tokenizer.
            bos_token: The token that begins a sequence, if a template may write it into the prompt.
            path: Its file, if the sandbox is to tokenise with it because here that might never end.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.bos_token = bos_token
        self._path = path
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.byte_ids = frozenset(found for token in BYTES if (found := tokenizer.token_to_id(token)) is not None)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """Read `tokenizer.json`, and the name of the first token from `tokenizer_config.json`.

        Raises:
            BundleError: A file is missing or cannot be read, or the tokenizer's decoder might never end.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise BundleError(f"{path} is missing")
        data = _read_bytes(path, MAX_TOKENIZER)
        try:
            if not loads_safely(data):
                _encode_apart(path, "", special=False)  # What the sandbox survives does no harm here.
            tokenizer = Tokenizer.from_buffer(data)
        except (KeyboardInterrupt, SystemExit, BundleError):
            raise
        except BaseException as error:  # tokenizers raises plain Exception, and for a panic what is none.
            raise BundleError(f"{path} cannot be read: {_one_line(error)}") from error
        if not decodes_safely(tokenizer):
            raise BundleError(f"{path} has a decoder that LeanVLM does not know; remove its steps but for the usual ones")
        bos_token = _special_tokens(_read_json(folder / "tokenizer_config.json")).get("bos_token")
        return cls(tokenizer, bos_token, None if encodes_safely(tokenizer) else path)

    def check(self, vocab_size: int, image_token_id: int) -> None:
        """Refuse a tokenizer of another model.

        Args:
            vocab_size: Rows of the model's token table.
            image_token_id: The token that stands for an image.

        Raises:
            BundleError: It has more tokens than the model, or not the image's.
        """
        highest = max(self.tokenizer.get_added_tokens_decoder(), default=0)
        highest = max(highest, self.tokenizer.get_vocab_size() - 1)
        if highest >= vocab_size:
            raise BundleError(f"{TOKENIZER} has tokens up to {highest}, the model {vocab_size}: {ANOTHER_MODELS}")
        if self.tokenizer.id_to_token(image_token_id) is None:
            raise BundleError(f"{TOKENIZER} does not know the image's token {image_token_id}: {ANOTHER_MODELS}")

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds to a sequence.

        None are added to a text that already begins with the first token, so it never stands there twice: so does
        `processor.apply_chat_template(tokenize=True)` of transformers (whereas `processor(text=...)` doubles it).

        Raises:
            InputError: The text holds half of a surrogate pair, or is longer than any context.
            BundleError: The tokenizer fails, or takes more time or memory than any text needs.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid Unicode: character {error.start} is a lone surrogate") from error
        if len(text) > MAX_PROMPT:
            raise InputError(f"the prompt has {len(text)} characters, of {MAX_PROMPT} at most")
        special = self.bos_token is None or not text.startswith(self.bos_token)
        if self._path is not None:
            return _encode_apart(self._path, text, special=special)
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # As above.
            raise BundleError(f"{TOKENIZER} does not work: {_one_line(error)}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; raises BundleError if the tokenizer fails."""
        try:
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # As above.
            raise BundleError(f"{TOKENIZER} does not work: {_one_line(error)}") from error

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


def check_image_tokens(found: int, images: int, raw: str | None = None) -> None:
    """Make sure that a prompt has an image token for every image.

    Args:
        found: Image tokens of the prompt.
        images: How many images are given with it.
        raw: The image token's text, where the user writes it; None where a template does.

    Raises:
        InputError: The prompt has more or fewer image tokens than there are images.
    """
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
        named = (entry for entry in reversed(template) if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries such as `bos_token`, whose values are a string or an object with its `content`."""
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in contents.items() if name.endswith("_token") and isinstance(value, str)}


def _encode_apart(path: Path, text: str, *, special: bool) -> list[int]:
    """Tokenise a text in the sandbox; raises BundleError if that fails."""
    kind, value = sandbox().ask("encode", str(path.resolve()), path.stat().st_mtime_ns, text, special)
    if kind != "ids":
        raise BundleError(f"{path.name} {value if kind == 'size' else f'cannot be used: {value}'}")
    return list(value)


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {_one_line(error)}") from error
    if len(data) > limit:
        raise BundleError(f"{path} has more than {limit >> 20} MB, which is too much for what it holds")
    return data


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path, LIMIT).decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} cannot be read: {_one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    data = load_json(path, BundleError)
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object")
    return data


def _one_line(error: BaseException) -> str:
    return shorten(error) or type(error).__name__
