"""`leanvlm serve`: a bundle behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanvlm.runtime.commands.cli import Budget, Bundle, Device, Provider, Threads

if TYPE_CHECKING:
    from leanvlm.runtime.serving.config import ServeConfig

PARTS = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    bundle: Bundle,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own want a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key that clients must send.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the folder's name by default.")] = None,
    budget: Budget = None,
    device: Device = None,
    provider: Provider = None,
    threads: Threads = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Answers at once; usually 8 on a GPU, 4 on a processor.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions of a prompt and its answer; usually 2,048.")] = None,
    cache_mb: Annotated[float, typer.Option(min=0, help="Encoded pictures that are kept, MB.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; the next gets 503.")] = 32,
    max_body_mb: Annotated[float, typer.Option(help="Largest request, MB.")] = 32,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a request's images together.")] = 64_000_000,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Positions of a prompt; the context by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer that may be asked for.")] = 1024,
    max_seconds: Annotated[float, typer.Option(help="From a request to the end of its answer.")] = 300,
    allow_remote_images: Annotated[
        str | None, typer.Option(help="Hosts from which images are fetched, such as images.example.org,10.0.0.5:8080.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running answers once told to end.")] = 30,
) -> None:
    """Serve a bundle over HTTP: OpenAI's chat interface, and a page to try it."""
    from leanvlm.runtime.optional import require

    for part in PARTS:
        require(part, "serve")
    from leanvlm.runtime.serving.config import ServeConfig

    hosts = tuple(one.strip() for one in (allow_remote_images or "").split(",") if one.strip())
    config = ServeConfig(
        host=host, port=port, api_key_file=api_key_file, name=name, budget=budget, rows=rows, context=context,
        max_queue=max_queue, max_body_mb=max_body_mb, max_held_mb=max(256, max_body_mb), max_images=max_images,
        max_pixels=max_pixels, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, max_seconds=max_seconds,
        allow_remote_images=hosts, grace=grace,
    )  # fmt: skip
    _run(bundle, config, device, provider, threads, cache_mb)


def _run(
    bundle: Path, config: ServeConfig, device: str | None, provider: str | None, threads: int | None, cache_mb: float
) -> None:
    from leanvlm.runtime.serving.access import read_key
    from leanvlm.runtime.serving.app import create_app
    from leanvlm.runtime.serving.server import bind, make_server, run
    from leanvlm.runtime.session import load

    if config.api_key_file is not None:
        read_key(config.api_key_file)
    # Before the bundle is opened, which may take a minute.
    sockets = bind(config.host, config.port)
    try:
        with load(bundle, device=device, provider=provider, threads=threads, cache_mb=cache_mb) as session:
            app = create_app(session, config)
            run(make_server(app), sockets)
    finally:
        for one in sockets:
            one.close()
