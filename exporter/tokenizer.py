"""The tokenizer file of a bundle: the checkpoint's own, if transformers reads it as it stands.

The runtime takes `tokenizer.json` literally. transformers rebuilds some tokenizers (Llama's among them) from their vocabulary
with rules of its own, and a checkpoint is defined by what its processor does; so where the two differ, that is written.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

# Spaces at both ends, digits, accents, other scripts, an emoji, line breaks: where rebuilt tokenizers differ.
PROBES = (
    "USER: \nWhat is on the table? ASSISTANT:",
    "  two  spaces ",
    "Año 2026, naïve café: 12345.678",
    "画像には何がありますか",
    "👩‍🚀 & <b>tags</b>\n\n\ttabs",
    "</s> after an end",
)


def write_tokenizer(checkpoint: Path, folder: Path) -> bool:
    """Write `tokenizer.json` into a bundle so that it gives the checkpoint's token ids.

    Args:
        checkpoint: Folder with the checkpoint's tokenizer.
        folder: The bundle, with a copy of the checkpoint's file.

    Returns:
        Whether transformers' version replaced the copy.
    """
    theirs = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    path = folder / "tokenizer.json"
    ours = Tokenizer.from_file(str(path))
    ours.no_truncation()
    ours.no_padding()
    if all(ours.encode(text).ids == theirs(text)["input_ids"] for text in PROBES):
        return False
    theirs.backend_tokenizer.save(str(path))
    return True
