"""Streaming against decoding everything at once, and stop strings against a search of the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
from byte_fallback import LLAMA
from hypothesis import given
from hypothesis import strategies as st

from leanvlm.demo import MODEL_DIR
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.streaming import BYTES, MAX_PENDING, UNDECODED, AnswerText, StopStrings, StreamDecoder
from leanvlm.runtime.text import TextTokenizer

DEMO = TextTokenizer.from_folder(MODEL_DIR)
BOTH = pytest.mark.parametrize("tokenizer", [LLAMA, DEMO], ids=["byte-fallback", "byte-level"])


def pieces_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


UNICODE = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ▁abth 🎉👩‍👩‍👧日é\ufffd\n")))


@BOTH
@given(text=UNICODE)
def test_pieces_join_to_the_full_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    # A character that came in halves would have shown up as a replacement character.
    assert "".join(pieces).count(UNDECODED) == text.count(UNDECODED)


def token_ids(tokenizer: TextTokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens in any order; every other one a byte, or a piece of the characters that bytes make up."""
    emoji = tokenizer.tokenizer.encode("🎉é日\ufffd ", add_special_tokens=False).ids
    size = tokenizer.tokenizer.get_vocab_size()
    rare = [tokenizer.tokenizer.token_to_id(byte) for byte in BYTES] if tokenizer.byte_ids else emoji
    return st.lists(st.one_of(st.integers(0, size - 1), st.sampled_from(emoji), st.sampled_from(rare)), max_size=80)


@given(ids=token_ids(DEMO))
def test_pieces_of_any_byte_level_tokens_join_to_the_full_text(ids: list[int]) -> None:
    assert "".join(pieces_of(DEMO, ids)) == DEMO.decode(ids)


@given(ids=token_ids(LLAMA))
def test_pieces_of_any_byte_fallback_tokens_join_to_the_full_text(ids: list[int]) -> None:
    assert "".join(pieces_of(LLAMA, ids)) == LLAMA.decode(ids)


@BOTH
@given(data=st.data())
def test_what_was_given_out_never_changes(tokenizer: TextTokenizer, data: st.DataObject) -> None:
    ids = data.draw(token_ids(tokenizer))
    whole = tokenizer.decode(ids)
    assert all(whole.startswith(text) for text in accumulate(pieces_of(tokenizer, ids)))


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["▁the", "▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "s"], ["the", " ", "", "", "", "", "🎉s", ""]),
        (["▁a", "</s>", "▁the", "<image>", "▁▁", "b"], ["a", "", " the", "", "  ", "b", ""]),
        (["<0xFF>", "a"], ["", "\ufffda", ""]),
        (["<0xC3>", "<0xA9>", "<0xFF>", "a"], ["", "", "", "\ufffd\ufffd\ufffda", ""]),
        (["a", "<0xE2>", "<0x9C>"], ["a", "", "", "\ufffd\ufffd"]),
        (["</s>"], ["", ""]),
    ],
)
def test_pieces_come_as_soon_as_they_are_whole(tokens: list[str], pieces: list[str]) -> None:
    assert pieces_of(LLAMA, [LLAMA.tokenizer.token_to_id(token) for token in tokens]) == pieces


def test_a_flushed_stream_starts_anew() -> None:
    ids = LLAMA.tokenizer.encode("the a", add_special_tokens=False).ids
    stream = LLAMA.stream()
    texts = ["".join([*(stream.push(token_id) for token_id in ids), stream.flush()]) for _ in range(2)]
    assert texts == ["the a", "the a"]


class CountingTokenizer(TextTokenizer):
    """Counts the tokens that it is asked to decode."""

    decoded = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode, and count."""
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


@BOTH
@pytest.mark.parametrize("text", ["a", "the ", "🎉", "\ufffd"])
def test_the_work_per_token_is_bounded(tokenizer: TextTokenizer, text: str) -> None:
    counting = CountingTokenizer(tokenizer.tokenizer)
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids * 300
    stream = StreamDecoder(counting)
    pieces = [*(stream.push(token_id) for token_id in ids), stream.flush()]
    assert counting.decoded <= 3 * MAX_PENDING * len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("before", range(2 * MAX_PENDING))
def test_a_character_behind_wrong_bytes_stays_whole(before: int) -> None:
    emoji = DEMO.tokenizer.encode("🎉", add_special_tokens=False).ids
    ids = emoji[-1:] * before + emoji
    assert "".join(pieces_of(DEMO, ids)) == DEMO.decode(ids) == UNDECODED * before + "🎉"


def test_wrong_bytes_come_out_while_they_come() -> None:
    wrong = DEMO.tokenizer.encode("🎉", add_special_tokens=False).ids[-1:]
    stream = DEMO.stream()
    assert len("".join(stream.push(token_id) for token_id in wrong * 300)) == 299


# ------------------------------------------------------------------------------------------------- stop strings


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is shown of `text`, by looking at every beginning of it in turn."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    shown = "".join([*map(stop.push, pieces), stop.flush()])
    assert (shown, stop.stopped) == until_stop("".join(pieces), stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    stop = StopStrings(["\nUSER:", "###"])
    assert [stop.push(piece) for piece in ("Yes.", "\nUS", "A", "#", "##!", "more")] == [
        "Yes.",
        "",
        "\nUSA",
        "",
        "",
        "",
    ]
    assert stop.stopped
    assert stop.flush() == ""


@pytest.mark.parametrize(
    ("stop", "shown"),
    [("</s>", "one"), ("</", "one"), ("ne</s> t", "o"), ("</s>wo", "one two"), ("</s> two!", "one two"), ("<", "one")],
)
def test_stop_strings_match_special_tokens_which_are_not_shown(stop: str, shown: str) -> None:
    stops = StopStrings([stop])
    pieces = [stops.push("one"), stops.push("</s>", shown=False), stops.push(" two"), stops.flush()]
    assert "".join(pieces) == shown


@pytest.mark.parametrize(
    ("stops", "text", "tokens"),
    [
        ([], "the 日a", 7),
        (["</s>"], "the 日", 6),
        (["日</s>"], "the ", 6),
        (["</s>a"], "the 日", 7),
        ([" no"], "the 日a", 7),
        (["the "], "", 2),
    ],
)
def test_a_special_token_among_others_can_stop_an_answer(stops: list[str], text: str, tokens: int) -> None:
    ids = [LLAMA.tokenizer.token_to_id(token) for token in ("▁the", "▁", "<0xE6>", "<0x97>", "<0xA5>", "</s>", "a")]
    answer = AnswerText(LLAMA, stops)
    pieces: list[str] = []
    while len(pieces) < len(ids) and not answer.stopped:
        pieces.append(answer.push(ids[len(pieces)]))
    assert len(pieces) == tokens
    pieces.append(answer.flush())
    assert "".join(pieces) == answer.text == text


def test_the_end_token_has_no_text() -> None:
    answer = AnswerText(LLAMA)
    assert answer.push(LLAMA.tokenizer.token_to_id("▁the")) == "the"
    assert answer.push(LLAMA.tokenizer.token_to_id("s"), end=True) == answer.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        StopStrings(["a", ""])
