"""A tokenizer of Llama's kind, small."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from leanvlm.runtime.text import TextTokenizer


def llama_like() -> Tokenizer:
    """A tokenizer of Llama's kind: a word begins with ▁, and unknown characters are spelt in UTF-8 bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:!?0123456789\nABISTUV"]
    merges = [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n"), ("▁▁", "▁▁")]
    vocab = {piece: index for index, piece in enumerate([*pieces, *letters, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*pieces[:3], "<image>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


LLAMA = TextTokenizer(llama_like(), "<s>")
