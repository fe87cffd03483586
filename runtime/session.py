"""A bundle in use: images and a prompt in, text out.

One answer goes through preprocess, vision graph (vision, project, prune), splice, prefill, sample and decode. Where each
embedding of a prompt goes is decided here, so the graphs know nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from leanvlm.runtime.answer import Answer, Generation, Timings
from leanvlm.runtime.backends import Backend, Decoder, Graph, open_backend
from leanvlm.runtime.bundle import read_manifest, verify_files
from leanvlm.runtime.crops import Arrangement
from leanvlm.runtime.draft import Draft, Room, Vocabulary
from leanvlm.runtime.embeddings import TokenTable
from leanvlm.runtime.encoder import Encoder
from leanvlm.runtime.errors import BundleError, ContextOverflowError, InputError, SessionClosedError
from leanvlm.runtime.generation import MAX_NEW_TOKENS, GenerateOptions, GenerationSettings
from leanvlm.runtime.layout import ImageFeatures, least_positions
from leanvlm.runtime.manifest import MANIFEST, Manifest
from leanvlm.runtime.pictures import Pictures
from leanvlm.runtime.preprocess import ImageSource, image_list
from leanvlm.runtime.prompt import Prompt, assemble, compose
from leanvlm.runtime.records import shorten
from leanvlm.runtime.reuse import CACHE_MB, MEGABYTE, ImageCache
from leanvlm.runtime.sandbox import sandbox
from leanvlm.runtime.text import Message, Template, TextTokenizer, check_image_tokens

MAX_CACHE_MB = 2.0**20
# A cache a little larger than needed serves the next turns and prompts too.
CACHE_STEP = 64
# All of the model's.
CONTEXT = Room()


class Session:
    """Runs a bundle. Open one with `load`; it is a context manager.

    Answers are independent: any number of threads may ask at once, and any number of streams may be read in turn; each answer
    has a cache of its own and is what it is alone. They take turns on the device, token by token, so asking together answers
    nobody sooner. The first has the cache that is kept, and on a GPU the captured graphs; those beside it pay for their own.

    Nothing is done twice: a picture that `stream` encoded before is known by its content, at each budget; and of a prompt that
    begins as the last conversation did, with the same pictures, only the rest is read. `Answer.timings` says what was reused.

    Vision graphs open when a budget is first used, each with its own copy of the weights in memory.

    Attributes:
        manifest: What the bundle says of itself.
        folder: Where it is.
        backend: What runs its graphs.
        settings: What its generation_config.json says.
        encoder: What turns images into embeddings.
        line_end: Row of the token table that ends a line of image tokens; -1 where the layout has none.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, cache_mb: float = CACHE_MB) -> None:
        self.folder = folder
        self.manifest = manifest
        self.backend = backend
        self.template = Template.from_folder(folder)
        self.tokenizer = TextTokenizer.from_folder(folder)
        self.tokenizer.check(manifest.decoder.vocab_size, manifest.image_token_id)
        token = self._placeholder
        if not token or any(token in text for text in manifest.layout.texts):
            raise BundleError(f"{MANIFEST}: the image token {shorten(token)!r} is empty, or in a text of the layout")
        self.line_end = self._line_end()
        decoder = manifest.decoder
        self.table = TokenTable(folder / manifest.embed_tokens, decoder.table_rows, decoder.hidden_size, decoder.row_width)
        self.settings = GenerationSettings.from_folder(folder)
        self.settings.check(manifest.decoder.vocab_size)
        self.end_ids = self.settings.end_ids
        self.encoder = Encoder(manifest, backend)
        by_number = manifest.crops.several != "alike"
        self._pictures = Pictures(self.encoder, ImageCache(int(cache_mb * MEGABYTE)), by_number)
        self._decoder: Decoder | None = None
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the graphs and their memory; the next piece of a stream in progress is a SessionClosedError."""
        with self.backend.lock:
            self._closed = True
            self.encoder.close()
            self._pictures.cache.clear()
            self._decoder = None

    def generate(
        self, prompt: str | Sequence[Message], images: ImageSource | Sequence[ImageSource] = (), **options: Any
    ) -> Answer:
        """Answer a prompt; takes what `stream` takes and returns the finished answer."""
        return self.stream(prompt, images, **options).answer

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        budget: int | None = None,
        raw: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        **settings: Any,
    ) -> Generation:
        """Answer a prompt piece by piece.

        Args:
            prompt: The user's text, or messages as in Hugging Face chat templates (an image part for each image).
            images: One image or several in the order of their image tokens; each as `load_image` takes it: a path, the bytes of
                an image file, an open file, a Pillow image or levels (H, W, 3) uint8.
            budget: Image tokens kept per crop; one of the bundle's, None for its default.
            raw: The prompt is the whole text as it is, with the image token (`image_token`) once for each image; no template.
            max_new_tokens: Where the answer is cut.
            temperature: 0 is greedy.
            seed: Makes sampling repeatable.
            stop: Strings that end the answer; they match the text of special tokens too.
            ignore_end: Go on after an end token, for measuring.
            settings: `top_logprobs`; `top_p`, `top_k`, `min_p`, for sampling, and the fields of `LogitsConfig`, such as
                `repetition_penalty`; of the latter two one that is missing or None is as the checkpoint's
                generation_config.json says.

        Raises:
            InputError: An option, image or prompt that cannot be used.
            ContextOverflowError: Prompt and answer do not fit the model's context; said before any image is encoded, unless
                only the ends of lines make them too long.
        """
        images = image_list(images)
        options = self.settings.options(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop, ignore_end=ignore_end, **settings
        )
        return Generation(self._pieces(self.draft(prompt, images, options, budget=budget, raw=raw)))

    def draft(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        options: GenerateOptions,
        *,
        budget: int | None = None,
        raw: bool = False,
        start: float | None = None,
        room: Room = CONTEXT,
    ) -> Draft:
        """Encode a prompt's images and put the prompt together; its answer is begun with `tokens`.

        Args:
            prompt: As `stream` takes it.
            images: In order.
            options: How to generate.
            budget: As `stream` takes it.
            raw: As `stream` takes it.
            start: `perf_counter()` when the request came; None is now.
            room: Positions that there are for prompt and answer.
        """
        chosen = self.manifest.budget(budget)
        messages = [user_message(prompt, len(images))] if isinstance(prompt, str) and not raw else prompt
        if raw and not (isinstance(prompt, str) and prompt.strip()):
            raise InputError("a raw prompt is a text that is not empty")
        begin, timings = perf_counter(), Timings()
        # What text an image becomes may depend on its size.
        asked = self._pictures.look_up(images, chosen)
        opened = perf_counter()
        timings.preprocess += 1e3 * (opened - begin)
        ids = self.prompt_ids(messages, asked.arrangements)
        self.check_context(ids, asked.arrangements, chosen, options.max_new_tokens, room)
        options.logits.check_ids(self.manifest.decoder.vocab_size)
        timings.splice += 1e3 * (perf_counter() - opened)
        features = self._pictures.encode(asked, chosen, timings)
        return self._draft(ids, features, options, timings, begin if start is None else start, room)

    def arrange(
        self, images: Sequence[ImageSource], among: int | None = None
    ) -> tuple[Sequence[ImageSource], list[Arrangement]]:
        """Say how images will be cut, for which those that become tiles are opened; see `Encoder.arrange`."""
        return self.encoder.arrange(images, among)

    def encode_images(
        self, images: Sequence[ImageSource], budget: int, timings: Timings | None = None, among: int | None = None
    ) -> list[ImageFeatures]:
        """Turn images into the embeddings that the decoder reads; see `Encoder.encode`."""
        return self.encoder.encode(images, budget, timings or Timings(), among)

    def vision(self, budget: int, shape: int = 0) -> Graph:
        """Return the vision graph of a budget, opened on first use; see `Encoder.graph`."""
        return self.encoder.graph(budget, shape)

    @property
    def keeps(self) -> bool:
        """Whether pictures and the last conversation are kept."""
        return self._pictures.cache.limit > 0

    def respond(
        self,
        messages: str | Sequence[Message],
        features: Sequence[ImageFeatures],
        options: GenerateOptions,
        timings: Timings | None = None,
        start: float | None = None,
    ) -> Generation:
        """Answer a conversation whose images are encoded already.

        Args:
            messages: The conversation; or a text that is the whole prompt, with one image token for each image.
            features: One entry for each image part, in order.
            options: How to generate.
            timings: Times so far.
            start: `perf_counter()` when the request came, for the time to the first token.
        """
        timings = timings or Timings()
        begin = perf_counter()
        start = begin if start is None else start
        ids = self.prompt_ids(messages, [image.arrangement for image in features])
        timings.splice += 1e3 * (perf_counter() - begin)
        return Generation(self._pieces(self._draft(ids, features, options, timings, start)))

    def _draft(
        self,
        ids: Sequence[int],
        features: Sequence[ImageFeatures],
        options: GenerateOptions,
        timings: Timings,
        start: float,
        room: Room = CONTEXT,
    ) -> Draft:
        begin = perf_counter()
        options.logits.check_ids(self.manifest.decoder.vocab_size)
        prompt = self.prompt(ids, features)
        self._check_fit(max(len(prompt), prompt.next_position), options.max_new_tokens, room)
        timings.splice += 1e3 * (perf_counter() - begin)
        vocabulary = Vocabulary(self.tokenizer, self.table, self.end_ids)
        return Draft(vocabulary, prompt, features, self.manifest.layout, options, timings, start)

    def prompt_ids(self, messages: str | Sequence[Message], images: int | Sequence[Arrangement]) -> list[int]:
        """Render and tokenise a conversation, or tokenise a raw prompt; every run of image tokens is one in the result.

        Args:
            messages: The conversation; or a text that is the whole prompt, with one image token for each image.
            images: How each image is cut; or how many there are, each of one crop.

        Raises:
            InputError: The prompt has more or fewer image tokens than there are images.
        """
        raw, token, layout = isinstance(messages, str), self._placeholder, self.manifest.layout
        arrangements = [Arrangement()] * images if isinstance(images, int) else images
        text = messages if isinstance(messages, str) else self.template.render(messages)
        if layout.written and token in text:
            raise InputError(f"the prompt has {token} in it, which stands for an image's tokens; leave it out of the text")
        check_image_tokens(text.count(self.image_token), len(arrangements), self.image_token if raw else None)
        ids = self.tokenizer.encode(layout.expand(text, token, arrangements))
        runs, found = sum(layout.runs(image) for image in arrangements), ids.count(self.manifest.image_token_id)
        if found != runs:
            raise BundleError(
                f"the tokenizer takes {found} image tokens {shorten(token)!r} from a prompt with {runs}, so it or the layout "
                f"in {MANIFEST} is another model's: copy or export the bundle again"
            )
        return ids

    @property
    def image_token(self) -> str:
        """The text that stands for an image in a raw prompt."""
        return self.manifest.layout.written or self._placeholder

    @property
    def _placeholder(self) -> str:
        """The token whose places image tokens take."""
        return str(self.tokenizer.tokenizer.id_to_token(self.manifest.image_token_id))

    def _line_end(self) -> int:
        text = self.manifest.layout.line_break
        found = self.tokenizer.tokenizer.token_to_id(text) if text else self.manifest.line_end
        if found is None:
            raise BundleError(
                f"the tokenizer does not know {shorten(text)!r}, so it or the layout in {MANIFEST} is another model's: copy or "
                "export the bundle again"
            )
        return int(found)

    def decoder(self) -> Decoder:
        """Return the decoder, opened on first use. Beside other threads, use it under `backend.lock`."""
        with self.backend.lock:
            self._check_open()
            if self._decoder is None:
                self._decoder = self.backend.decoder()
            return self._decoder

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("this session is closed; load the bundle again")

    def prompt(self, ids: Sequence[int], images: Sequence[ImageFeatures]) -> Prompt:
        """Plan a prompt: the images' crops in place of the image tokens.

        Args:
            ids: As `prompt_ids` returns them.
            images: One entry for each image of the prompt, in order.
        """
        manifest = self.manifest
        runs = compose(ids, manifest.image_token_id, images, manifest.layout)
        return assemble(runs, self.table, manifest.positions, manifest.image_token_id, self.line_end)

    def check_context(
        self, ids: Sequence[int], images: Sequence[Arrangement], budget: int, new: int, room: Room = CONTEXT
    ) -> None:
        """Raise ContextOverflowError if a prompt cannot fit the model's context with its answer, before images are encoded.

        Args:
            ids: The prompt, as `prompt_ids` returns it.
            images: How each image is cut.
            budget: Image tokens kept per crop.
            new: Tokens of the answer at most.
            room: Positions that there are.
        """
        manifest, rows, positions = self.manifest, 0, 0
        for image in images:
            shape, kept = manifest.crops.shapes[image.shape], manifest.vision_graph(budget, image.shape).kept
            least = least_positions(image, manifest.layout, shape, kept, "compact")
            rows += least
            if manifest.positions.image == "grid":
                positions += manifest.positions.width(shape, kept)
            elif manifest.positions.kept == "original":
                positions += least_positions(image, manifest.layout, shape, kept, "original")
        text = len(ids) - ids.count(manifest.image_token_id)
        self._check_fit(text + max(rows, positions), new, room)

    def _check_fit(self, prompt: int, new: int, room: Room) -> None:
        context = self.manifest.decoder.context_length
        if room.prompt is not None and prompt > room.prompt:
            raise ContextOverflowError(f"the prompt takes {prompt} positions; at most {room.prompt} are read")
        limit = context if room.whole is None else min(room.whole, context)
        if prompt + new > limit:
            end = f"the model's context holds {context}" if limit == context else f"here {limit} fit"
            raise ContextOverflowError(
                f"the prompt takes {prompt} positions and the answer up to {new}, together {prompt + new}; {end}"
            )

    def _pieces(self, draft: Draft) -> Generator[str, None, Answer]:
        """Yield the answer's text as it comes and return the finished answer."""
        with closing(self.tokens(draft)) as tokens:
            for _ in tokens:
                if piece := draft.push():
                    yield piece
                if draft.done:
                    break
        if rest := draft.flush():
            yield rest
        return draft.answer

    def tokens(self, draft: Draft) -> Generator[None, None, None]:
        """Add tokens to a draft, up to `max_new_tokens`: prefill, then one decode step a token, each in a turn of its own.

        Whoever pushes the newest token's text stops when the draft is done.
        """
        timings, prompt = draft.timings, draft.prompt
        with self.backend.lock:
            self._check_open()
            decoder = self.decoder()
            begin = perf_counter()
            context = self.manifest.decoder.context_length
            sequence = decoder.sequence(_round_up(draft.room, context), prompt if self.keeps else None, context)
            timings.reused_positions = sequence.past
            timings.splice += 1e3 * (perf_counter() - begin)
        with closing(sequence):
            for count in range(draft.options.max_new_tokens):
                with self.backend.lock:
                    self._check_open()
                    begin = perf_counter()
                    if count == 0:
                        sequence.load(prompt)
                        timings.splice += 1e3 * (perf_counter() - begin)
                        begin = perf_counter()
                        scores = sequence.prefill()
                        timings.prefill = 1e3 * (perf_counter() - begin)
                    else:
                        token = draft.ids[-1]
                        scores = sequence.step(self.table.rows([token])[0], draft.next_position, token)
                    if draft.reads_best and draft.goes_on:
                        sequence.ahead(self.table.row, draft.next_position + 1, draft.ends)
                    if count > 0:
                        scores.wait()
                        timings.decode.append(1e3 * (perf_counter() - begin))
                    draft.choose(scores)
                yield


def load(
    bundle: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    verify: bool = False,
    prepack: bool = True,
    provider: str | None = None,
    cache_mb: float = CACHE_MB,
) -> Session:
    """Open a bundle.

    Args:
        bundle: The folder that `leanvlm export` wrote.
        device: `cpu` or `cuda`; None is the bundle's own. With OpenVINO one of its devices, such as `GPU`.
        provider: Of a bundle for cpu `onnxruntime` (as None), `openvino`, or `openvino:f32` for all in fp32. Of one for
            TensorRT `tensorrt` or `nv-tensorrt-rtx`: what ONNX Runtime runs it with; None runs its engines.
        threads: Processor threads for the CPU; None leaves the choice to whatever runs the graphs. More than there are
            processors are not used, with a warning.
        verify: Compare every file's sha256 with the manifest first.
        prepack: False keeps the weights mapped from the files, which is slower and takes half the memory; not with OpenVINO,
            which arranges them as it likes.
        cache_mb: Encoded pictures that are kept at most, MB. 0 keeps neither pictures nor the last conversation: every answer
            takes as long as the first.

    Raises:
        BundleError: The folder is no bundle, or is incomplete or damaged.
        BackendError: This machine cannot run it.
        InputError: A size that is not possible.
    """
    folder = Path(bundle)
    if not 0 <= cache_mb <= MAX_CACHE_MB:
        raise InputError(f"cache_mb {cache_mb:g} is not possible; give 0 to {MAX_CACHE_MB:g} MB")
    manifest = read_manifest(folder)
    sandbox().start()  # It is ready by the time that the backend is.
    if verify:
        verify_files(folder, manifest)
    backend = open_backend(folder, manifest, device=device, threads=threads, prepack=prepack, provider=provider)
    return Session(folder, manifest, backend, cache_mb)


def user_message(text: str, images: int) -> Message:
    """Return a user's message of some images followed by text.

    Raises:
        InputError: The text is empty.
    """
    if not text.strip():
        raise InputError("the prompt is empty; ask something, such as 'What is in the image?'")
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def _round_up(positions: int, limit: int) -> int:
    return min(-(-positions // CACHE_STEP) * CACHE_STEP, limit)
