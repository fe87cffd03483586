"""The tokenizer file of a bundle: the checkpoint's own, if transformers reads it as it stands.

The runtime takes `tokenizer.json` literally. transformers adds special tokens out of other files, and rebuilds some tokenizers
(Llama's among them) from their vocabulary with rules of its own. A checkpoint is defined by what its processor does; so where
the two differ, that is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from leanvlm.runtime.errors import CheckpointError, UnsupportedModelError
from leanvlm.runtime.records import shorten

# Spaces at both ends, digits, accents, other scripts, an emoji, line breaks: where rebuilt tokenizers differ.
PROBES = (
    "USER: \nWhat is on the table? ASSISTANT:",
    "  two  spaces ",
    "Año 2026, naïve café: 12345.678",
    "画像には何がありますか",
    "👩‍🚀 & <b>tags</b>\n\n\ttabs",
    "</s> after an end",
)


def load_tokenizer(checkpoint: Path) -> Any:
    """Return the tokenizer that transformers makes of a checkpoint's files; a class of its own is not run.

    Raises:
        CheckpointError: It makes none.
    """
    # Not with the package mistral-common, which transformers takes where it is installed: it reads another file.
    options = {"local_files_only": True, "trust_remote_code": False, "mistral_format": False}
    try:
        return AutoTokenizer.from_pretrained(checkpoint, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # The files can be wrong in any way; for a panic tokenizers raises what is no Exception.
        why = shorten(error) or type(error).__name__
        raise CheckpointError(f"{checkpoint}: transformers cannot read the tokenizer: {why}") from error


def named_token(config: Mapping[str, Any], name: str, usual: str) -> str:
    """Return the text of a model's own special token, as transformers reads it of `tokenizer_config.json`.

    Args:
        config: The file's content.
        name: What the tokenizer's attribute is called.
        usual: What counts where the file does not name it.

    Raises:
        UnsupportedModelError: It is no text.
    """
    own = config.get("extra_special_tokens")
    found = own[name] if isinstance(own, Mapping) and name in own else config.get(name)
    text = found.get("content") if isinstance(found, Mapping) else usual if found is None else found
    if not isinstance(text, str):
        raise UnsupportedModelError(f"the tokenizer's {name} is {shorten(repr(found))}; it must be a text")
    return text


def write_tokenizer(theirs: Any, folder: Path) -> bool:
    """Make a bundle's `tokenizer.json` give the token ids of transformers, and skip the same tokens as special.

    Args:
        theirs: What `load_tokenizer` returned.
        folder: The bundle, with a copy of the checkpoint's file.

    Returns:
        Whether transformers' version replaced the copy.
    """
    path = folder / "tokenizer.json"
    ours, backend = Tokenizer.from_file(str(path)), theirs.backend_tokenizer
    ours.no_truncation()
    ours.no_padding()
    same = _special(ours) == _special(backend)
    if same and all(ours.encode(text).ids == _ids(theirs, text) for text in _probes(ours, backend)):
        return False
    backend.save(str(path))
    return True


def _ids(theirs: Any, text: str) -> list[int]:
    """Return transformers' token ids of a text."""
    try:
        ids: list[int] = theirs(text)["input_ids"]
    except Exception as error:  # Its settings can be wrong in any way.
        why = shorten(error) or type(error).__name__
        raise CheckpointError(f"transformers' tokenizer fails, see tokenizer_config.json: {why}") from error
    return ids


def _probes(*tokenizers: Tokenizer) -> Iterator[str]:
    """Yield texts to compare tokenizers by; every added token stands in one with and without spaces around it."""
    yield from PROBES
    for token in sorted({token.content for one in tokenizers for token in one.get_added_tokens_decoder().values()}):
        yield f"a{token}b {token} c"


def _special(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the special tokens."""
    return {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
