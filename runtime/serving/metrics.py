"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from leanvlm.runtime.answer import Answer, Timings
from leanvlm.runtime.serving.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a cached picture on a GPU to a large model on a board.
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STEPS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STAGES = ("preprocess", "vision_graph", "prefill", "decode")
"""Stages that are timed; `vision_graph` is vision, project and prune, and `decode` all steps of an answer."""


class Metrics:
    """Counters and times of one server, in a registry of its own; every method is called on the event loop's thread."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("leanvlm_requests", "HTTP requests by path and status.", ("path", "status"), registry=registry)
        self.outcomes = Counter(
            "leanvlm_answers", "Answers by how they ended: stop, length, cancelled, failed.", ("outcome",), registry=registry
        )
        self._first = Histogram(
            "leanvlm_time_to_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=registry
        )
        self._between = Histogram(
            "leanvlm_inter_token_seconds", "Between pieces of text, most of them a token.", buckets=STEPS, registry=registry
        )
        self._queue = Histogram(
            "leanvlm_queue_seconds", "From the queue's end to its head.", buckets=(0.001, *SECONDS), registry=registry
        )
        self._stages = Histogram(
            "leanvlm_stage_seconds", "Time of a stage in one answer.", ("stage",), buckets=(0.001, *SECONDS), registry=registry
        )
        self._tokens = Counter("leanvlm_tokens", "Tokens read and generated.", ("kind",), registry=registry)
        self._image_tokens = Counter("leanvlm_image_tokens", "Image tokens kept and dropped.", ("kind",), registry=registry)
        self._images = Counter("leanvlm_images", "Images, encoded or known from before.", ("source",), registry=registry)
        self._reused = Counter("leanvlm_reused_positions", "Positions of prompts that the cache still held.", registry=registry)
        waiting = Gauge("leanvlm_waiting", "Requests in the queue.", registry=registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("leanvlm_running", "Answers in the making.", registry=registry)
        running.set_function(lambda: engine.running)
        for outcome in ("stop", "length", "cancelled", "failed"):
            self.outcomes.labels(outcome)

    def begun(self, timings: Timings, waited: float) -> None:
        """Count a prompt that was put together.

        Args:
            timings: So far.
            waited: Seconds since it was asked.
        """
        busy = (timings.preprocess + timings.vision + timings.splice) / 1e3
        self._queue.observe(max(waited - busy, 0.0))

    def piece(self, waited: float) -> None:
        """Count a piece of text that came so many seconds behind the last one of its answer."""
        self._between.observe(waited)

    def ended(self, answer: Answer) -> None:
        """Count a finished answer."""
        timings, generated = answer.timings, len(answer.token_ids)
        self.outcomes.labels(answer.finish_reason).inc()
        self._first.observe(timings.time_to_first_token / 1e3)
        times = timings.to_dict()
        for stage in STAGES:
            self._stages.labels(stage).observe(times[stage] / 1e3)
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("generated").inc(generated)
        kept, total = (sum(getattr(image, name) for image in answer.images) for name in ("kept", "total"))
        self._image_tokens.labels("kept").inc(kept)
        self._image_tokens.labels("dropped").inc(total - kept)
        self._images.labels("known").inc(timings.reused_images)
        self._images.labels("encoded").inc(len(answer.images) - timings.reused_images)
        self._reused.inc(timings.reused_positions)

    def text(self) -> bytes:
        """Return what Prometheus reads."""
        return generate_latest(self._registry)
