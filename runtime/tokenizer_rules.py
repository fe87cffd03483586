"""Whether what a tokenizer does to a text is of bounded work, for every text: then it may run in this process.

`tokenizer.json` describes a chain of steps. Its regular expressions can backtrack for hours, a run of replacements can double a
text sixty times, and a table of character mappings is read without any check. So only what is listed here is known to be
bounded; a tokenizer with anything else works too, in the sandbox.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    # tiktoken's r50k_base; cl100k_base, also with single digits; o200k_base, also without contractions.
    rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    *(
        rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{end}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{end}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for end, digits in ((rf"(?i:{CONTRACTIONS})?", r"\p{N}{1,3}"), ("", r"\p{N}"))
    ),
}
"""Regular expressions of published tokenizers, which look at a character a few times at most."""

LINEAR = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt", "Prepend", "Replace"),
    *("ByteLevel", "Digits", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"),
    *("Punctuation", "UnicodeScripts", "Split", "BertProcessing", "RobertaProcessing", "TemplateProcessing"),
    *("ByteFallback", "Fuse", "BPEDecoder", "WordPiece", "CTC"),
}
MODELS = ("BPE", "WordLevel")

MAX_GROWTH = 16
"""What all replacements together may lengthen a text by."""

MAX_STEP = 1 << 16
"""Characters of a step's description; of GPT-4o's they are 500."""

# What tokenizers reads without a check, or letters that JSON writes as they are and only a disguise escapes.
_UNCHECKED = re.compile(rb':\s*"Precompiled"|"continuing_subword_prefix"\s*:\s*"[^"]|\\u00[4-7]')


def loads_safely(data: bytes) -> bool:
    """Return whether reading a tokenizer's file ends well or with an error, whatever is in it."""
    return _UNCHECKED.search(data) is None


def encodes_safely(tokenizer: Tokenizer) -> bool:
    """Return whether tokenising takes time and memory in proportion to the text."""
    model = tokenizer.model
    affixes = (getattr(model, name, None) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if type(model).__name__ not in MODELS or any(len(affix) > MAX_GROWTH for affix in affixes):
        return False
    return all(_bounded(step) for step in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor))


def decodes_safely(tokenizer: Tokenizer) -> bool:
    """Return whether turning tokens into text does."""
    return _bounded(tokenizer.decoder)


def _bounded(step: Any) -> bool:
    """Return whether a step, or a sequence of them, is of bounded work."""
    if step is None:
        return True
    state = step.__getstate__()
    return len(state) <= MAX_STEP and math.prod(map(_growth, _parts(json.loads(state)))) <= MAX_GROWTH


def _growth(part: dict[str, Any]) -> float:
    """Return what a step may lengthen a text by; infinity where its work is not known."""
    kind, pattern = part["type"], part.get("pattern", {})
    regex, text = pattern.get("Regex"), pattern.get("String")
    if kind not in LINEAR or (regex is not None and regex not in PATTERNS):
        return math.inf
    if kind == "TemplateProcessing" and not _named(part):
        return math.inf
    if kind == "Replace":
        return max(1.0, len(part["content"]) / len(text)) if text else math.inf
    if kind == "Strip" and part.get("stop"):  # A decoder's: it looks for the end of tokens that have none.
        return math.inf
    return max(1.0, len(part["prepend"])) if kind == "Prepend" else 1.0


def _named(part: dict[str, Any]) -> bool:
    """Return whether the special tokens that a sequence gets are there; tokenizers finds out, and panics, with a text."""
    used = {piece["SpecialToken"]["id"] for piece in (*part["single"], *part["pair"]) if "SpecialToken" in piece}
    return used <= set(part["special_tokens"])


def _parts(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the steps of a sequence, at any depth, or the step itself."""
    inner = next((step[name] for name in ("normalizers", "pretokenizers", "processors", "decoders") if name in step), None)
    if step.get("type") != "Sequence" or inner is None:
        yield step
        return
    for part in inner:
        yield from _parts(part)
