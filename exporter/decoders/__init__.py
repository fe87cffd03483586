"""Decoders: the language models that a bundle can hold, whatever family they sit in."""
