"""The text of an answer while it comes: tokens detokenised piece by piece, and the strings that end it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import TYPE_CHECKING

from leanvlm.runtime.errors import InputError

if TYPE_CHECKING:
    from leanvlm.runtime.text import TextTokenizer

UNDECODED = "\N{REPLACEMENT CHARACTER}"

MAX_PENDING = 16
"""Tokens that may wait for the end of a character before the settled ones among them are let go."""

CHARACTER = 4
"""Bytes of the longest character, so of 4 borders between tokens in a row one is a border of characters."""

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens that tokenizers with byte fallback have for single bytes."""


class StreamDecoder:
    """Text of tokens as they come; the pieces always join to what decoding all of them at once gives.

    A token is decoded behind the one before it, because tokenizers write spaces according to what stands in front,
    and only text that no later token can change is given out:

    - At the end of a text one U+FFFD may be half of a character. It waits.
    - In tokenizers with byte fallback one wrong byte turns its whole run of bytes into U+FFFD. The run waits for its end.

    Special tokens are skipped. The work per token does not grow with the answer.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._given = ""  # The part of the window's text that is out already.

    def push(self, token_id: int) -> str:
        """Take a token and return the text that it completes, often one word, possibly none."""
        if token_id in self._tokenizer.special:
            return ""
        self._pending.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode(self._context + self._pending)
        if not text.endswith(UNDECODED):
            return self._settle(text)
        piece = self._give(text[: -len(UNDECODED)])
        if len(self._pending) >= MAX_PENDING:
            self._let_go(text)
        return piece

    def rest(self) -> str:
        """Return what is held back, as it is if the answer ends here."""
        return self._tokenizer.decode(self._context + self._pending)[len(self._given) :] if self._pending else ""

    def flush(self) -> str:
        """Return what was held back at the end of the answer, and make ready for another."""
        piece = self.rest()
        self._context, self._pending, self._given = [], [], ""
        return piece

    def _give(self, text: str) -> str:
        """Give out the window's text up to here."""
        piece, self._given = text[len(self._given) :], text
        return piece

    def _settle(self, text: str) -> str:
        """Give out the rest of the window's text, and make its last tokens the context of the next."""
        piece = self._give(text)
        following = self._tokenizer.decode(self._pending)
        if following:
            self._context, self._given = self._pending, following
        else:
            # A context without text would leave the next token at the beginning, where its space is cut off.
            self._context = self._context + self._pending
        self._pending = []
        return piece

    def _let_go(self, text: str) -> None:
        """Shorten a window of wrong bytes, at a border that no character crosses: there the halves' texts join to the whole."""
        window = self._context + self._pending
        for size in range(1, CHARACTER + 1):
            tail = self._tokenizer.decode(window[-size:])
            if self._tokenizer.decode(window[:-size]) + tail == text:
                self._context, self._pending, self._given = [], window[-size:], tail[: -len(UNDECODED)]
                return


class AnswerText:
    """The text of one answer, without special tokens, the stop string that ends it and the spaces that it begins with.

    Templates end right behind "ASSISTANT:", so the first space is of no use.

    Attributes:
        text: What is out already.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        # Special tokens behind text that is held back: how much text is in front of each.
        self._waiting: list[tuple[int, str]] = []
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.stopped

    def push(self, token_id: int, *, end: bool = False) -> str:
        """Take a token and return the text that it completes; the `end` token, special or not, has none."""
        special = self._tokenizer.special.get(token_id, "")
        if not (special or end):
            return self._give(self._feed(self._stream.push(token_id)))
        rest = self._stream.rest()
        if end or self._stops.match(rest, special):
            return self._give(self._feed(self._stream.flush()) + self._stops.push(special, shown=False))
        self._waiting.append((len(rest), special))
        return self._give(self._feed(""))

    def flush(self) -> str:
        """Return what was held back at the end of the answer."""
        return self._give(self._feed(self._stream.flush()) + self._stops.flush())

    def _feed(self, piece: str) -> str:
        """Hand text to the stop strings, with the special tokens that stand in it, and return what can be shown."""
        shown, at = "", 0
        while self._waiting and self._waiting[0][0] <= len(piece):
            offset, special = self._waiting.pop(0)
            shown += self._stops.push(piece[at:offset]) + self._stops.push(special, shown=False)
            at = offset
        self._waiting = [(offset - len(piece), special) for offset, special in self._waiting]
        return shown + self._stops.push(piece[at:])

    def _give(self, piece: str) -> str:
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece


class StopStrings:
    """Ends an answer at the first of some strings, and holds back text that could be the beginning of one.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first counts.

    Attributes:
        stopped: Whether a stop string was found; nothing comes out any more then.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Set the strings.

        Args:
            stops: Strings that end the answer and are no part of it; none is allowed.

        Raises:
            InputError: A stop string is empty.
        """
        self._stops = tuple(stops)
        if not all(self._stops):
            raise InputError("a stop string must not be empty")
        self._held = ""
        self._shown: list[bool] = []  # For each held character, whether it is part of the answer.
        self.stopped = False

    def push(self, text: str, *, shown: bool = True) -> str:
        """Take a piece of text and return what can be shown.

        Args:
            text: The piece.
            shown: False for a special token: stop strings match its text, the answer leaves it out.
        """
        if self.stopped:
            return ""
        self._held += text
        self._shown += [shown] * len(text)
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0))

    def match(self, text: str, special: str) -> bool:
        """Return whether a text and a special token behind it would complete a stop string."""
        return any(stop in self._held + text + special for stop in self._stops)

    def flush(self) -> str:
        """Return what was held back: at the end of the answer it is text like any other."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, end: int) -> str:
        """Take held text up to `end`, and return what of it is shown."""
        piece = "".join(compress(self._held[:end], self._shown))
        self._held, self._shown = self._held[end:], self._shown[end:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
