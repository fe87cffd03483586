"""llama.cpp through `xllamacpp`, whose wheels hold its server; the prompt cache is on, as by default.

Its wheels for processors are built without AVX-512 and bfloat16, so that they run on any; a build of one's own is faster.
Requests go to the server's own route over the machine's loopback: that one takes a picture with a prompt that is written out.
"""

from __future__ import annotations

import base64
import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

from bench.beside.worker import IMAGE, Answered, Clock


class Peer:
    """One slot of its server.

    Args:
        folder: Of `gguf_files.py`.
        threads: Processor threads.
    """

    def __init__(self, folder: str, threads: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(Path(folder) / "decoder.gguf")
        params.mmproj.path = str(Path(folder) / "tower.gguf")
        params.n_ctx = 2048
        params.n_parallel = 1
        params.warmup = False
        for used in (params.cpuparams, params.cpuparams_batch):
            used.n_threads = threads
        self._server = xllamacpp.Server(params)
        self._address = str(self._server.listening_address)
        with urllib.request.urlopen(f"{self._address}/props") as reply:
            # Where a picture stands; it is another one each time.
            self._marker = json.load(reply)["media_marker"]

    def answer(self, prompt: str, jpeg: bytes, tokens: int) -> Answered:
        """Answer by its route for completions, token by token."""
        clock, last = Clock(), {}
        asked = {
            "prompt": {
                "prompt_string": prompt.replace(IMAGE, self._marker),
                "multimodal_data": [base64.b64encode(jpeg).decode()],
            },
            "n_predict": tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "return_tokens": True,
            "stream": True,
        }
        request = urllib.request.Request(
            f"{self._address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            for line in reply:
                if line.startswith(b"data: "):
                    last = self._take(json.loads(line[6:]), clock)
        return clock.answered(last.get("tokens_evaluated"))

    @staticmethod
    def _take(part: dict[str, Any], clock: Clock) -> dict[str, Any]:
        if "error" in part:
            raise RuntimeError(str(part["error"]))
        if not part.get("stop"):  # The last one repeats nothing.
            for token in part["tokens"]:
                clock.add(token)
        return part

    def versions(self) -> dict[str, str]:
        """Return the version of the binding."""
        return {"xllamacpp": str(xllamacpp.__version__)}
