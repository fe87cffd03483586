"""`leanvlm serve` as OpenAI's own client sees it, beside what the session answers by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from served import CHAT, Gated, Served, image_part, served, text_part, until

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime import Answer, Session, load
from leanvlm.runtime.serving.config import ServeConfig

QUESTION, ANSWER = "What is below the green ring?", "a yellow hexagon"
OTHER = SAMPLES_DIR / "simple-9001.png"


@pytest.fixture(scope="module")
def session(demo_bundle: Path) -> Iterator[Session]:
    with load(demo_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Served]:
    with served(session, ServeConfig(rows=1)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as found:
        yield found


def user(*images: Path | bytes, text: str = QUESTION) -> dict[str, Any]:
    files = [image if isinstance(image, bytes) else image.read_bytes() for image in images]
    return {"role": "user", "content": [*map(image_part, files), text_part(text)]}


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(model="demo-64", messages=messages, **options)  # type: ignore[call-overload]


def alone(session: Session, messages: list[dict[str, Any]], images: list[Path], **options: Any) -> Answer:
    """Return the session's own answer to the same conversation."""
    own = []
    for message in messages:
        content = message["content"] if isinstance(message["content"], list) else [text_part(message["content"])]
        parts = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
        own.append({"role": message["role"], "content": parts})
    return session.generate(own, images, **options)


def test_an_answer_is_the_session_s(client: openai.OpenAI, session: Session, sample_image: Path) -> None:
    expected = session.generate(QUESTION, sample_image)
    assert expected.text == ANSWER
    found = ask(client, [user(sample_image)])
    choice, usage = found.choices[0], found.usage
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert len(found.choices) == 1
    assert found.model == "demo-64"
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.prompt_tokens_details
    assert (details.image_tokens, details.image_tokens_unpruned) == (64, 576)


def test_a_streamed_answer_is_the_same(client: openai.OpenAI, sample_image: Path) -> None:
    chunks = list(ask(client, [user(sample_image)], stream=True, stream_options={"include_usage": True}))
    *told, counted = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == ANSWER
    assert told[0].choices[0].delta.role == "assistant"
    # Exactly once, in the last chunk that has a choice.
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["stop"]
    assert len(told) > 3
    assert not counted.choices
    assert (counted.usage.prompt_tokens, counted.usage.completion_tokens) == (78, 4)
    assert not any(chunk.usage for chunk in told)
    assert {chunk.id for chunk in chunks} == {counted.id}


def test_a_stream_on_the_wire(server: Served, sample_image: Path) -> None:
    status, headers, body = server.ask(body={"messages": [user(sample_image)], "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    assert not any("usage" in json.loads(event[6:]) for event in events[:-2])


def test_the_budget_of_a_request(client: openai.OpenAI, session: Session, sample_image: Path) -> None:
    found = ask(client, [user(sample_image)], extra_body={"budget": 576})
    expected = session.generate(QUESTION, sample_image, budget=576)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens == 78 + 512
    assert found.usage.prompt_tokens_details.image_tokens == 576


def test_several_images_and_turns(client: openai.OpenAI, session: Session, sample_image: Path) -> None:
    first = user(sample_image, OTHER, text="What is red?")
    assistant = {"role": "assistant", "content": "nothing"}
    messages = [{"role": "system", "content": "Be short."}, first, assistant, user(text="What is below the green ring?")]
    found = ask(client, messages, max_tokens=12)
    expected = alone(session, messages, [sample_image, OTHER], max_new_tokens=12)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.prompt_tokens_details.image_tokens_unpruned == 2 * 576
    # The order of images counts.
    turned = [messages[0], user(OTHER, sample_image, text="What is red?"), *messages[2:]]
    other = ask(client, turned, max_tokens=12, logprobs=True)
    assert other.choices[0].message.content == alone(session, turned, [OTHER, sample_image], max_new_tokens=12).text
    # What the openai client returns can be sent back as it is.
    assert ask(client, [first, found.choices[0].message.model_dump(), user(text="Why?")], max_tokens=3).choices


def test_log_probabilities(client: openai.OpenAI, session: Session, sample_image: Path) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    whole = ask(client, [user(sample_image)], **asked).choices[0].logprobs.content
    streamed = [
        one
        for chunk in ask(client, [user(sample_image)], stream=True, **asked)
        for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [one.token for one in streamed] == [one.token for one in whole]
    # A prompt that is known is read in another order, which rounds otherwise.
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in whole], abs=1e-5)
    expected = session.generate(QUESTION, sample_image, top_logprobs=3)
    # The end token is no part of the text.
    assert [one.logprob for one in whole] == pytest.approx([chance.logprob for chance in expected.chances[:-1]], abs=1e-5)
    assert "".join(one.token for one in whole).strip() == ANSWER
    assert [bytes(one.bytes).decode() for one in whole] == [one.token for one in whole]
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token for one in whole)


@pytest.mark.parametrize("stop", ["hexa", ["zzz", " yellow"]])
def test_stop_strings(client: openai.OpenAI, session: Session, sample_image: Path, stop: Any) -> None:
    found = ask(client, [user(sample_image)], stop=stop).choices[0]
    expected = session.generate(QUESTION, sample_image, stop=stop)
    assert (found.message.content, found.finish_reason) == (expected.text, "stop")
    assert len(expected.text) < len(ANSWER)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_cut_answer_says_so(client: openai.OpenAI, session: Session, sample_image: Path, limit: str) -> None:
    found = ask(client, [user(sample_image)], extra_body={"ignore_eos": True}, logprobs=True, **{limit: 9})
    expected = session.generate(QUESTION, sample_image, max_new_tokens=9, ignore_end=True)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (expected.text, "length")
    assert found.usage.completion_tokens == 9
    assert len(found.choices[0].logprobs.content) == 9


def test_sampling_is_the_session_s(client: openai.OpenAI, session: Session, sample_image: Path) -> None:
    options = {"temperature": 1.9, "top_p": 0.99}
    texts = set()
    for seed in (5, 6, -(2**40)):
        found = ask(client, [user(sample_image)], seed=seed, max_tokens=16, extra_body={"ignore_eos": True}, **options)
        own = session.generate(
            QUESTION, sample_image, seed=seed % 2**64, max_new_tokens=16, ignore_end=True, **options  # type: ignore[arg-type]
        )  # fmt: skip
        assert found.choices[0].message.content == own.text
        texts.add(own.text)
    assert len(texts) > 1


def test_details_say_what_was_kept(server: Served, session: Session) -> None:
    """Of a picture that lies on its side in the file, and of which the sides are cut off."""
    upright = Image.open(SAMPLES_DIR / "complex-9003.png").convert("RGB").resize((500, 400))
    exif = upright.getexif()
    exif[274] = 6
    file = BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    body = {"messages": [user(file.getvalue())], "details": True}
    whole = json.loads(server.ask(body=body)[2])["leanvlm"]
    expected = session.generate(QUESTION, file.getvalue())
    (image,) = whole["images"]
    assert (whole["budget"], image["kept"], image["total"], image["tiles"]) == (64, 64, 576, [0, 0])
    (crop,) = image["crops"]
    assert crop["grid"] == [24, 24]
    assert crop["kept"] == expected.pruning[0].indices.tolist()
    assert len(crop["attention"]) == 576
    assert max(crop["attention"]) == 1
    assert crop["attention"].index(1) == int(expected.pruning[0].attention.argmax())
    # 336 of the 420 columns that it has once resized.
    assert crop["box"] == pytest.approx([0.1, 0, 0.9, 1])
    assert set(whole["timings_ms"]) == set(expected.timings.to_dict())
    events = server.ask(body={**body, "stream": True})[2].decode().split("\n\n")[:-2]
    first, *_, last = (json.loads(event[6:]) for event in events)
    assert first["leanvlm"] == {"budget": 64, "images": whole["images"]}
    assert last["leanvlm"]["reused"] == {"images": 1, "positions": 77}
    assert sum("leanvlm" in event for event in events) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(session: Session, stream: bool) -> None:
    runner = Gated(session)
    with served(session, ServeConfig(rows=1), runner) as server:
        connection, body = server.connect(), {"messages": [user(text="Why?")], "max_tokens": 900, "ignore_eos": True}
        runner.gate.clear()
        before = runner.steps
        connection.request("POST", CHAT, json.dumps({**body, "stream": stream}), {"Content-Type": "application/json"})
        until(lambda: server.metric("leanvlm_running") == 1)
        if stream:
            assert connection.getresponse().readline().startswith(b"data: {")
        assert connection.sock is not None or stream
        connection.close()
        until(lambda: server.metric('leanvlm_answers_total{outcome="cancelled"}') == 1)
        runner.gate.set()
        until(lambda: server.metric("leanvlm_running") == 0)
        # But for the one in hand.
        assert runner.steps <= before + 1
        with server.client() as client:
            assert ask(client, [user(text="Why?")], max_tokens=2).choices
        assert server.metric('leanvlm_answers_total{outcome="length"}') == 1


def test_a_full_queue(session: Session) -> None:
    runner = Gated(session)
    with served(session, ServeConfig(rows=1, max_queue=1), runner) as server:
        body = json.dumps({"messages": [user(text="Why?")], "max_tokens": 2, "stream": True})
        runner.gate.clear()
        connections = [server.connect() for _ in range(2)]
        for number, connection in enumerate(connections):
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            until(lambda number=number: server.metric("leanvlm_waiting") + server.metric("leanvlm_running") == number + 1)  # type: ignore[misc]
        status, headers, refused = server.ask(body=body.encode())
        assert (status, headers["retry-after"]) == (503, "2")
        assert json.loads(refused)["error"]["code"] == "queue_full"
        with server.client() as client, pytest.raises(openai.InternalServerError, match="wait already"):
            ask(client, [user(text="Why?")])
        runner.gate.set()
        for connection in connections:
            assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
            connection.close()


def test_what_is_measured(session: Session, sample_image: Path) -> None:
    with served(session, ServeConfig(rows=1)) as server, server.client() as client:
        for _ in range(2):
            ask(client, [user(sample_image)])
        with pytest.raises(openai.BadRequestError):
            ask(client, [user(sample_image)], n=2)
        found = {
            'leanvlm_requests_total{path="/v1/chat/completions",status="200"}': 2,
            'leanvlm_requests_total{path="/v1/chat/completions",status="400"}': 1,
            'leanvlm_answers_total{outcome="stop"}': 2,
            'leanvlm_stage_seconds_count{stage="prefill"}': 2,
            "leanvlm_time_to_first_token_seconds_count": 2,
            # Of three pieces in each answer.
            "leanvlm_inter_token_seconds_count": 4,
            "leanvlm_queue_seconds_count": 2,
            'leanvlm_tokens_total{kind="generated"}': 8,
            'leanvlm_image_tokens_total{kind="kept"}': 128,
            'leanvlm_image_tokens_total{kind="dropped"}': 2 * 512,
            "leanvlm_waiting": 0,
            "leanvlm_running": 0,
        }
        assert {name: server.metric(name) for name in found} == found
        assert server.metric('leanvlm_images_total{source="known"}') >= 1
        assert server.metric("leanvlm_reused_positions_total") >= 77


def test_a_nucleus_of_nothing_is_the_most_probable_token(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo-64", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 6}
    greedy, narrow = (
        client.chat.completions.create(**asked, **options) for options in ({}, {"temperature": 1.5, "top_p": 0, "seed": 3})
    )
    assert narrow.choices[0].message.content == greedy.choices[0].message.content


def test_a_context_without_room_for_a_picture(session: Session) -> None:
    """It is ready for what does fit, and asks for fewer tokens by itself than the usual 128."""
    with served(session, ServeConfig(rows=2, context=64)) as server:
        until(lambda: server.ask("/health/ready")[0] == 200)
        with server.client() as client:
            said = client.chat.completions.create(model="demo-64", messages=[{"role": "user", "content": "hi"}])
            assert said.usage is not None
            assert said.usage.completion_tokens <= 16
            content: Any = [image_part((SAMPLES_DIR / "complex-9003.png").read_bytes()), text_part("What?")]
            with pytest.raises(openai.BadRequestError, match=r"the prompt takes \d+ positions; at most 64 are read"):
                client.chat.completions.create(model="demo-64", messages=[{"role": "user", "content": content}])


def test_what_a_client_asks_first(client: openai.OpenAI, server: Served) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("demo-64", "leanvlm")
    assert client.models.retrieve("demo-64") == model
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        client.models.retrieve("other")
    assert model.leanvlm == {  # type: ignore[attr-defined]
        "budgets": [64, 576], "default_budget": 64, "unpruned": 576, "target": "cpu", "precision": "fp32", "max_images": 8,
        "context": 2048,
    }  # fmt: skip
    assert server.ask("/health")[0] == server.ask("/health/ready")[0] == 200
    # As AIPerf looks whether there are metrics.
    assert server.ask("/metrics", method="HEAD")[::2] == (200, b"")
