"""The text side of a bundle: tokenizer, special tokens, chat template and generation settings, as transformers reads them.

The ecosystem writes these into a dozen files that overrule each other. Here transformers itself reads them, and a bundle gets
four files that leave nothing to decide: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and
`generation_config.json`. A plan writes them too, into a folder that goes away, so that it refuses what an export would.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import ProcessorMixin

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.config import NO_TEMPLATE, ExportConfig
from leanvlm.exporter.decoders import context_length
from leanvlm.exporter.generation import generation_config
from leanvlm.exporter.tokenizer import PROBES, load_tokenizer, write_tokenizer
from leanvlm.exporter.verify import NEW_TOKENS
from leanvlm.runtime.errors import BundleError, CheckpointError, InputError, UnsupportedModelError
from leanvlm.runtime.generation import GENERATION_CONFIG, GenerationSettings
from leanvlm.runtime.records import load_json, shorten
from leanvlm.runtime.session import user_message
from leanvlm.runtime.text import TEMPLATE, Template, TextTokenizer

WITHOUT = "{{ raise_exception('the bundle was exported without one; write the whole prompt and pass --raw-prompt') }}"
# Characters; templates that call tools have some ten thousand.
MAX_TEMPLATE = 2**20
QUESTION = "What is on the table?"
WAY_OUT = (
    f"give one that takes images with --template FILE, or export with --template {NO_TEMPLATE} and ask with run --raw-prompt"
)


def write_text_files(config: ExportConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a bundle's text files.

    Args:
        config: May name a template of its own.
        checkpoint: Where the files come from.
        folder: The bundle.

    Raises:
        LeanVLMError: A file that is missing, that cannot be read or that asks for what the runtime does not do.
    """
    settings = generation_config(checkpoint.folder, checkpoint.config)
    _write(folder / GENERATION_CONFIG, json.dumps(settings, indent=1) + "\n")
    settings_there = _tokenizer_settings(checkpoint.folder)
    ours = TextTokenizer.from_folder(checkpoint.folder)  # Says which file is damaged.
    for text in PROBES:
        ours.encode(text)  # And here, not in transformers, a regular expression that would not end.
    tokenizer = load_tokenizer(checkpoint.folder)
    if not checkpoint.frame.begun:
        tokenizer.add_bos_token = False
    shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
    write_tokenizer(tokenizer, folder)
    special = json.dumps(_with_special_tokens(settings_there, tokenizer), indent=1, ensure_ascii=False)
    _write(folder / "tokenizer_config.json", special + "\n")
    _write(folder / TEMPLATE, _template(config, checkpoint, tokenizer))


def _write(path: Path, text: str) -> None:
    """Write a text file; JSON can spell half a character, which no file holds."""
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the checkpoint's {path.name} holds text that is no Unicode: {error.reason}") from error


def check_text(config: ExportConfig, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose text files would not make a working bundle, before any weight is read.

    Raises:
        LeanVLMError: What `write_text_files` raises; tokens that the model has no embedding for; a template that does not
            write one image token for one image; a context that is too short for an image.
    """
    with TemporaryDirectory(prefix="leanvlm-") as scratch:
        folder = Path(scratch)
        write_text_files(config, checkpoint, folder)
        _check_ids(checkpoint, TextTokenizer.from_folder(folder), GenerationSettings.from_folder(folder))
        if config.template != NO_TEMPLATE:
            origin = checkpoint.name if config.template is None else f"--template {config.template}"
            _check_template(folder, checkpoint, origin)


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `tokenizer_config.json`, if it has one."""
    path = folder / "tokenizer_config.json"
    config = load_json(path, CheckpointError) if path.is_file() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def _with_special_tokens(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer's configuration with the special tokens that templates get, and without code to run."""
    names = {name for name, value in config.items() if name.endswith("_token") and not isinstance(value, bool)}
    special: dict[str, str] = tokenizer.special_tokens_map
    return {k: v for k, v in config.items() if k not in names | {"auto_map"}} | special


def _template(config: ExportConfig, checkpoint: Checkpoint, tokenizer: Any) -> str:
    """Return the source of the chat template: the one that the request names, else the checkpoint's."""
    if config.template == NO_TEMPLATE:
        return WITHOUT
    if config.template is not None:
        try:
            with Path(config.template).open(encoding="utf-8") as file:
                text = file.read(MAX_TEMPLATE + 1)
        except OSError as error:
            raise InputError(f"--template {config.template} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--template {config.template} is not UTF-8 text: {error.reason}") from error
        if len(text) > MAX_TEMPLATE:
            raise InputError(f"--template {config.template} has more than {MAX_TEMPLATE} characters, so it is no chat template")
        return text
    try:
        processor, _ = ProcessorMixin.get_processor_dict(checkpoint.folder, local_files_only=True)
    except Exception as error:  # The files can be wrong in any way.
        why = shorten(error) or type(error).__name__
        raise CheckpointError(f"{checkpoint.folder}: transformers cannot read the chat template: {why}") from error
    # A tokenizer's own counts where the processor has none.
    for source in (processor.get("chat_template"), tokenizer.chat_template):
        default = source.get("default") if isinstance(source, dict) else source
        if isinstance(default, str):
            return default
    if checkpoint.frame.template is not None:
        return checkpoint.frame.template
    raise CheckpointError(f"{checkpoint.name} has no chat template; {WAY_OUT}")


def _check_ids(checkpoint: Checkpoint, tokenizer: TextTokenizer, settings: GenerationSettings) -> None:
    """Refuse ids that the model has no embedding for; a table may well have more rows than there are tokens."""
    rows = int(checkpoint.config.text_config.vocab_size)
    name = checkpoint.name
    vocab = tokenizer.tokenizer.get_vocab()
    token, highest = max(vocab.items(), key=lambda item: item[1], default=("", -1))
    if highest >= rows:
        raise CheckpointError(
            f"{name}'s tokenizer has tokens up to {highest} ({shorten(repr(token))}), its model embeds {rows}; "
            "save it after model.resize_token_embeddings(len(tokenizer)), or with the tokenizer that it was trained with"
        )
    image = checkpoint.spec.image_token_id
    if image not in vocab.values():
        raise CheckpointError(
            f"{name}'s config.json says that token {image} stands for an image, which its tokenizer does not know; "
            "add it to the tokenizer, or set image_token_id (image_token_index in LLaVA's files) to the tokenizer's"
        )
    text = str(tokenizer.tokenizer.id_to_token(image))
    if any(text in mark for mark in checkpoint.frame.layout.texts):
        raise CheckpointError(
            f"{name}'s tokenizer_config.json has {shorten(repr(text))} in a mark around images, and that is the image token"
        )
    line_break = checkpoint.frame.layout.line_break
    if line_break and line_break not in vocab:
        raise CheckpointError(
            f"{name}'s tokenizer does not know {shorten(repr(line_break))}, which ends a line of image tokens; add it"
        )
    beyond = next((end for end in sorted(settings.end_ids) if end >= rows), None)
    if beyond is not None:
        raise CheckpointError(f"{name}'s eos_token_id {beyond} is beyond its model's {rows} tokens; set it to one of these")
    try:
        settings.logits.check_ids(rows)
    except InputError as error:
        raise CheckpointError(f"{name}'s {GENERATION_CONFIG}: {shorten(error)}") from error


def _check_template(folder: Path, checkpoint: Checkpoint, origin: str) -> None:
    """Refuse a template that does not write a question with one image, and one with none."""
    try:
        template, tokenizer = Template.from_folder(folder), TextTokenizer.from_folder(folder)
    except BundleError as error:
        raise CheckpointError(f"{origin}: {shorten(error)}") from error
    for images in (1, 0):
        try:
            text = template.render([user_message(QUESTION, images)])
        except InputError as error:
            raise UnsupportedModelError(f"{origin}: {shorten(error)}, so it may be for text only; {WAY_OUT}") from error
        except BundleError as error:
            raise CheckpointError(f"{origin}: {shorten(error)}; {WAY_OUT}") from error
        ids = tokenizer.encode(text)
        written = checkpoint.frame.layout.written
        found = text.count(written) if written else ids.count(checkpoint.spec.image_token_id)
        if found != images:
            what = f"writes {found} image tokens for {images} images, so it may be for text only"
        elif QUESTION not in text:
            what = "leaves the text out"
        else:
            _check_context(checkpoint, len(ids) - found)
            continue
        raise UnsupportedModelError(f"{origin}: the chat template {what}; {WAY_OUT}")


def _check_context(checkpoint: Checkpoint, words: int) -> None:
    """Refuse a model whose context does not hold one unpruned image with a short question and its answer."""
    context, image = context_length(checkpoint.config.text_config), checkpoint.spec.tokens_per_crop
    if image + words + NEW_TOKENS > context:
        raise CheckpointError(
            f"{checkpoint.name}'s context of {context} tokens (max_position_embeddings) does not hold an image of {image}, "
            f"a question of {words} and an answer of {NEW_TOKENS}; set it to what the model was trained with"
        )
