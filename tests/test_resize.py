"""Pictures resized by the graphs for a GPU, against Pillow level by level; on the processor where there is no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from PIL import Image

from leanvlm.demo import SAMPLES_DIR
from leanvlm.exporter.resize_graph import AXES, resize_file, write_resize_graph
from leanvlm.runtime import Session, load, taps
from leanvlm.runtime.backends import resizer as resizer_module
from leanvlm.runtime.backends.ort import PROVIDERS
from leanvlm.runtime.backends.ort_memory import DeviceMemory, preload_libraries
from leanvlm.runtime.backends.placement import misplaced_nodes
from leanvlm.runtime.backends.resizer import DeviceResizer, working_bytes
from leanvlm.runtime.crops import PIXELS, VALID, CropRule, CropShape, crop
from leanvlm.runtime.cuts import Cut, Picture, Piece, Uncut, Window, cut_pieces, is_height_first, order, part, whole
from leanvlm.runtime.encoder import in_parts
from leanvlm.runtime.errors import LeanVLMWarning, VerificationError
from leanvlm.runtime.preprocess import ImageSpec

Levels = npt.NDArray[np.uint8]
HAS_GPU = PROVIDERS["cuda"] in onnxruntime.get_available_providers()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:a bundle for cuda runs on cpu")
FILTERS = range(6)  # Those that a manifest may name.
AT_ONCE = 24
TILE = CropShape((28, 42), (2, 3))
SPEC = ImageSpec(None, (28, 42), layout="uint8")
GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7) if rows * columns > 1)


@pytest.fixture(scope="module")
def memory() -> DeviceMemory:
    if HAS_GPU:
        preload_libraries(onnxruntime)
    return DeviceMemory(onnxruntime, DEVICE)


@pytest.fixture(scope="module")
def resizer(tmp_path_factory: pytest.TempPathFactory, memory: DeviceMemory) -> DeviceResizer:
    folder = tmp_path_factory.mktemp("resize")
    opened = {}
    for first in AXES:
        write_resize_graph(folder, first)
        opened[first] = onnxruntime.InferenceSession(folder / resize_file(first), providers=[PROVIDERS[DEVICE]])
    return DeviceResizer(memory, {first: lambda first=first: opened[first] for first in AXES}, AT_ONCE)  # type: ignore[misc]


def levels(height: int, width: int, seed: int = 0) -> Levels:
    """Return a picture: noise, half of it black and white, which clips after every filter that rings."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    found[: height // 2] = np.where(found[: height // 2] < 128, 0, 255)
    return found


def cut_on_device(resizer: DeviceResizer, memory: DeviceMemory, crops: Uncut) -> Levels:
    """Return the crops (C, 3, H, W)."""
    target = memory.empty((len(crops), 3, *crops.pieces[0].cut.size), np.uint8)
    target.fill(np.full(target.shape, 77, np.uint8))
    resizer._fill(target, crops)
    return target.numpy()


def assert_equal(resizer: DeviceResizer, memory: DeviceMemory, picture: Picture, *cuts: Cut) -> None:
    crops = Uncut(tuple(Piece(picture, cut) for cut in cuts))
    assert all(map(resizer.takes, crops.pieces))
    wanted = np.stack(cut_pieces(crops.pieces)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(cut_on_device(resizer, memory, crops), wanted)


def random_sides(count: int, largest: tuple[int, int], seed: int) -> list[tuple[int, int]]:
    """Return sizes (height, width) from 1 x 1 on, as many small ones as large."""
    exponents = np.random.default_rng(seed).uniform(0, 1, (count, 2))
    return [(1, 1), largest, *(tuple(map(int, row)) for row in np.array(largest) ** exponents[2:])]


def assert_pictures_equal(resizer: DeviceResizer, memory: DeviceMemory, sizes: list[tuple[int, int]]) -> int:
    """Cut pictures of these sizes with all filters in turn, and return how many were left to the processor."""
    rng, left = np.random.default_rng(7), 0
    for seed, size in enumerate(sizes):
        resized = tuple(int(side) for side in np.array((448, 448)) ** rng.uniform(0.65, 1, 2))
        if seed % 8 == 3:
            resized = (size[0], resized[1]) if seed % 16 == 3 else (resized[0], size[1])  # One axis stays.
        begin = tuple(int(at) for at in rng.integers(-5, 6, 2))
        cut = part(size, resized, begin, (resized[0] + 3, resized[1]))  # type: ignore[arg-type]
        picture = Picture(Image.fromarray(levels(*size, seed)), FILTERS[seed % len(FILTERS)])
        if resizer.takes(Piece(picture, cut)):
            assert_equal(resizer, memory, picture, cut)
        else:
            left += 1
    return left


def test_two_hundred_random_pictures_equal_pillow(resizer: DeviceResizer, memory: DeviceMemory) -> None:
    assert assert_pictures_equal(resizer, memory, random_sides(200, (3000, 4000), 0)) == 0


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1, 1), (28, 42)), ((1, 9), (28, 42)), ((28, 42), (28, 42)), ((28, 300), (28, 42)), ((300, 42), (28, 42)),
        ((300, 60), (30, 55)), ((60, 300), (55, 30)), ((7, 5), (90, 80)), ((300, 11), (20, 80)), ((300, 301), (299, 300)),
    ],
)  # fmt: skip
def test_every_filter_equals_pillow(
    resizer: DeviceResizer, memory: DeviceMemory, resample: int, size: tuple[int, int], resized: tuple[int, int]
) -> None:
    assert_equal(resizer, memory, Picture(Image.fromarray(levels(*size)), resample), whole(size, resized))


def test_both_orders_of_the_axes_are_tested() -> None:
    """Which only a newer Pillow has."""
    first = {is_height_first(whole(size, (30, 55))) for size in ((300, 60), (60, 300))}
    assert first == ({True, False} if order() == "lossier" else {False})
    assert order() is not None


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_gpu_s_levels_equal_pillow_s(resizer: DeviceResizer, memory: DeviceMemory) -> None:
    assert assert_pictures_equal(resizer, memory, random_sides(200, (3000, 4000), 1)) == 0


RULES = {
    "the centre of the shorter edge": (CropRule("whole", (TILE,)), ImageSpec(28, (28, 42), layout="uint8")),
    "an edge that leaves black around it": (CropRule("whole", (TILE,)), ImageSpec(20, (28, 42), layout="uint8")),
    "no resize": (CropRule("whole", (TILE,)), SPEC),
    "one size": (CropRule("whole", (TILE,)), ImageSpec((28, 42), None, 2, layout="uint8")),
    "several are squares": (
        CropRule("whole", (TILE,), several="square", background=(9, 99, 200)),
        ImageSpec((28, 42), None, 1, layout="uint8"),
    ),
    "nearest": (
        CropRule("nearest", (CropShape((56, 28), (4, 2)), CropShape((28, 56), (2, 4))), pixels=(196, 9999)),
        ImageSpec((56, 28), None, layout="uint8"),
    ),
    "padded tiles": (
        CropRule("tiles", (TILE,), "resolution", GRIDS, "pad", "first"),
        ImageSpec((28, 42), None, layout="uint8"),
    ),
    "stretched tiles": (
        CropRule("tiles", (TILE,), "aspect", GRIDS, "stretch", "last"),
        ImageSpec((28, 42), None, 1, layout="uint8"),
    ),
    "tiles of a longest edge": (
        CropRule("tiles", (TILE,), "longest_edge", (), "stretch", "last", longest_edge=150),
        ImageSpec((28, 42), None, 1, layout="uint8"),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_crops_of_every_rule_equal_the_processor_s(resizer: DeviceResizer, memory: DeviceMemory, name: str) -> None:
    """Several pictures in a prompt, in parts of as many crops as go at once; 6 x 6 tiles are more."""
    rule, spec = RULES[name]
    pictures = [levels(*size, seed) for seed, size in enumerate([(60, 90), (200, 60), (31, 170), (170, 251), (1, 1), (3, 2)])]
    wanted, found = crop(pictures, spec, rule), crop(pictures, spec, rule, resizer=resizer)
    assert found.images == wanted.images
    for shape, inputs in wanted.inputs.items():
        parts = in_parts(found.inputs[shape], AT_ONCE)
        assert all(isinstance(part[PIXELS], Uncut) and len(part[PIXELS]) <= AT_ONCE for part in parts)
        cut = [cut_on_device(resizer, memory, part[PIXELS]) for part in parts]
        np.testing.assert_array_equal(np.concatenate(cut), inputs[PIXELS])
        if VALID in inputs:
            np.testing.assert_array_equal(np.concatenate([part[VALID] for part in parts]), inputs[VALID])
            assert [len(part[VALID]) for part in parts] == [len(part) for part in cut]


def test_tiles_that_do_not_go_at_once_are_split_in_order() -> None:
    for tiles in ((6, 6), (1, 40), (40, 1), (3, 2)):
        resized = (28 * tiles[0], 42 * tiles[1])
        picture = Picture(Image.fromarray(levels(90, 80)), 3)
        cut = part((90, 80), resized, (-3, -4), resized, tiles)
        small = list(cut.split(12))
        assert max(one.crops for one in small) <= 12
        together = cut_pieces([Piece(picture, one) for one in small])
        np.testing.assert_array_equal(together, cut_pieces([Piece(picture, cut)]))


def test_what_a_device_cannot_is_left_to_the_processor(
    resizer: DeviceResizer, monkeypatch: pytest.MonkeyPatch, memory: DeviceMemory
) -> None:
    rule, spec = RULES["one size"]
    small, narrow = Image.new("RGB", (50, 40)), Image.new("RGB", (1, 60_000))
    assert isinstance(crop([small], spec, rule, resizer=resizer).inputs[0][PIXELS], Uncut)
    # 2,143 rows under a filter: their sum is beyond what fp32 holds exactly.
    assert isinstance(crop([narrow], spec, rule, resizer=resizer).inputs[0][PIXELS], np.ndarray)
    assert isinstance(crop([small, narrow], spec, rule, resizer=resizer).inputs[0][PIXELS], np.ndarray)
    assert (
        working_bytes(whole((4096, 4096), (336, 336)))
        < resizer_module.MAX_BYTES
        < working_bytes(whole((8000, 8000), (336, 336)))
    )
    monkeypatch.setattr(resizer_module, "MAX_BYTES", working_bytes(whole((40, 50), (28, 42))) - 1)
    assert isinstance(crop([small], spec, rule, resizer=resizer).inputs[0][PIXELS], np.ndarray)
    monkeypatch.undo()
    monkeypatch.setattr("leanvlm.runtime.cuts.order", lambda: None)
    assert isinstance(crop([small], spec, rule, resizer=resizer).inputs[0][PIXELS], np.ndarray)


def test_a_device_without_memory_leaves_a_picture_to_the_processor(memory: DeviceMemory) -> None:
    def full() -> Any:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1234\nsecond line")

    picture = Picture(Image.fromarray(levels(60, 90)), 3)
    crops = Uncut((Piece(picture, whole((60, 90), (28, 42))),))
    target = memory.empty((1, 3, 28, 42), np.uint8)
    with pytest.warns(LeanVLMWarning, match="resized on the processor: Failed to allocate memory"):
        DeviceResizer(memory, {"width": full, "height": full}, AT_ONCE).fill(target, crops)
    np.testing.assert_array_equal(target.numpy()[0].transpose(1, 2, 0), cut_pieces(crops.pieces)[0])


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("length", "resized"), [(1280, 448), (960, 336), (50, 336), (4000, 60), (1, 9), (336, 336)])
def test_weights_are_exact_sums_of_small_parts(resample: int, length: int, resized: int) -> None:
    found = taps.taps(Window(length, resized, 0, resized), resample)
    assert found is not None
    count = found.index.shape[1]
    parts = found.weights.reshape(3, resized, count) * np.array([1, 1, 256], np.float32)[:, None, None]
    assert (np.abs(parts) <= 128).all()
    assert (parts == np.round(parts)).all()
    sums = np.einsum("pnt,p->n", parts.astype(np.float64), np.array([2.0**16, 2**8, 1]))
    # Each of the weights is rounded.
    assert np.abs(sums - 2**22).max() <= count
    assert all(len(set(row)) == count for row in found.index.tolist())
    assert found.index.min() >= 0
    assert found.index.max() < length


def test_one_wrong_weight_is_noticed(resizer: DeviceResizer, memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the smallest step that can change a level: of 2^22, one in a thousand."""
    right = taps.asked

    def wrong(*arguments: int) -> npt.NDArray[np.int32]:
        found = right(*arguments).copy()
        found[np.unravel_index(found.argmax(), found.shape)] += 1 << 12
        return found

    monkeypatch.setattr(taps, "asked", wrong)
    taps.taps.cache_clear()
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_equal(resizer, memory, Picture(Image.fromarray(levels(300, 400)), 3), whole((300, 400), (112, 150)))
    taps.taps.cache_clear()


# --- A bundle ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sessions(cuda_bundle: Path) -> Iterator[tuple[Session, Session]]:
    """The same bundle, with pictures resized on the processor and by the graph."""
    options: dict[str, Any] = {"device": DEVICE, "cache_mb": 0}  # Every picture is resized anew.
    with load(cuda_bundle, **options) as host, load(cuda_bundle, **options) as device:
        host.backend.resizer, backend = None, device.backend
        backend.resizer = backend.new_resizer()  # type: ignore[attr-defined]
        yield host, device


def test_a_bundle_s_answers_are_the_same(sessions: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = sessions
    filled: list[int] = []
    fill = DeviceResizer._fill

    def counted(self: DeviceResizer, target: Any, crops: Uncut) -> None:
        filled.append(len(crops))
        fill(self, target, crops)

    monkeypatch.setattr(DeviceResizer, "_fill", counted)
    pictures = [
        Image.open(SAMPLES_DIR / "complex-9003.png").convert("RGB"),
        levels(200, 333),
        (SAMPLES_DIR / "simple-9001.png"),
    ]
    for budget in host.manifest.budgets:
        for asked in (pictures, pictures[1:2]):
            answers = [
                session.generate("What is there?", asked, budget=budget, max_new_tokens=6, ignore_end=True)
                for session in (host, device)
            ]
            assert answers[0].token_ids == answers[1].token_ids
            for ours, theirs in zip(*(answer.pruning for answer in answers), strict=True):
                np.testing.assert_array_equal(ours.indices, theirs.indices)
    assert filled == [3, 1] * len(host.manifest.budgets)


def test_a_bundle_says_how_long_resizing_took(sessions: tuple[Session, Session]) -> None:
    timings = sessions[1].generate("What?", [levels(200, 333)], max_new_tokens=1).timings
    assert timings.preprocess > 0
    assert timings.vision > 0


@pytest.mark.skipif(HAS_GPU, reason="this machine has a CUDA device")
def test_on_the_processor_pillow_stays(cuda_bundle: Path) -> None:
    with pytest.warns(LeanVLMWarning, match="runs on cpu"), load(cuda_bundle, device="cpu") as session:
        assert session.backend.resizer is None


def test_a_bundle_without_the_graphs_works(sessions: tuple[Session, Session]) -> None:
    backend: Any = sessions[1].backend
    assert len(backend.manifest.resize) == 2
    manifest = backend.manifest
    backend.manifest = dataclasses.replace(manifest, resize=())
    assert backend.new_resizer() is None
    backend.manifest = manifest


def test_a_verification_compares_the_levels(sessions: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch) -> None:
    from leanvlm.exporter.verify import View, _check_resizing, probe_images

    session, images = sessions[1], probe_images()
    inputs = crop(images, session.manifest.image, session.manifest.crops).inputs[0]
    view = View(images, inputs, [], {}, np.zeros(0))
    _check_resizing(session, 0, view)
    wrong = {PIXELS: np.array(inputs[PIXELS])}
    wrong[PIXELS][0, 0, 5, 7] ^= 1
    with pytest.raises(VerificationError, match="1 levels of a picture resized on"):
        _check_resizing(session, 0, dataclasses.replace(view, inputs=wrong))
    monkeypatch.setattr(DeviceResizer, "_fill", lambda *_: [][0])
    with pytest.raises(VerificationError, match="pictures cannot be resized on"):
        _check_resizing(session, 0, view)


def test_every_node_of_a_resize_graph_is_placed(sessions: tuple[Session, Session]) -> None:
    backend: Any = sessions[1].backend
    for spec in backend.manifest.resize:
        events = backend.node_events(spec, resizer_module.probe())
        assert {event["args"]["op_name"] for event in events} >= {"ScatterElements", "Split", "Clip", "Floor"}
        assert misplaced_nodes(events, PROVIDERS[DEVICE]) == []
