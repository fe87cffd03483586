"""The demo's scenes: the same for ever, questions that the scene answers, pictures that show it."""

import dataclasses
import functools
import hashlib
import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from leanvlm.demo import SAMPLES_DIR
from leanvlm.demo.render import Renderer, render
from leanvlm.demo.scenes import (
    COLORS,
    FAMILIES,
    KINDS,
    PHOTO_KINDS,
    SHAPES,
    SIZE,
    TRAINING_SEED,
    Kind,
    Photo,
    Question,
    Scene,
    Sign,
    caption,
    held_out_questions,
    make_scene,
    mentioned,
    present,
    questions,
)

# Of the first 50 scenes and their held-out questions: the data that the built-in model's measured accuracy belongs to.
GOLDEN = {
    "simple": "701ea2f2838b510f07fb6d4b9e117ab66e73a60332110b3c79188868755dbbb0",
    "medium": "75758d548cf890d2bbec23d4f38873fee7cf5fb424c67ac1fe6e67f5f99fa033",
    "complex": "d3e4fd366a1eb7f0fd18ee55f75988623c47e25b7a51bece340c1a57624601b7",
    "simple-photo": "a16c32990dd9655587ea802ba695bf5a60758f9526c7391fddb607cf334269ed",
    "medium-photo": "74af65812d0a9f13967e26b2e3123f31d28d3553ac7f23426b2093b5f2509ca8",
    "complex-photo": "c62d3b8c736fc29914314c8fedfb61853e09a7c0503f1bddc75fe6d03de0ac50",
}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer("cpu")


@functools.cache
def held_out() -> tuple[tuple[Scene, Question], ...]:
    scenes = [make_scene(seed, kind) for kind in KINDS for seed in range(150)]
    return tuple((scene, question) for scene in scenes for question in held_out_questions(scene))


def asked(kind: str) -> list[tuple[Scene, Question]]:
    """The held-out questions of one family, each with its scene; at least 100, so that no test lacks cases."""
    cases = [(scene, question) for scene, question in held_out() if question.kind == kind]
    assert len(cases) >= 100
    return cases


def named(scene: Scene) -> list[tuple[str, float, float]]:
    """Name and centre of everything in the scene, from its fields."""
    things = [(f"{o.color} {o.shape}", o.cx, o.cy) for o in scene.objects]
    return things + ([("sign", scene.sign.cx, scene.sign.cy)] if scene.sign else [])


def counted(scene: Scene, words: str) -> int:
    """How many objects the words of a question name: "shapes", "red shapes" or "crosses"."""
    color, _, shape = words.rpartition(" ")
    return sum(
        (not color or o.color == color) and (shape == "shapes" or shape in (f"{o.shape}s", f"{o.shape}es"))
        for o in scene.objects
    )


@pytest.mark.parametrize("kind", GOLDEN)
def test_scenes_and_questions_never_change(kind: Kind) -> None:
    scenes = [make_scene(seed, kind) for seed in range(50)]
    rows = [[dataclasses.asdict(s), [dataclasses.asdict(q) for q in held_out_questions(s)]] for s in scenes]
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest() == GOLDEN[kind]


def test_a_seed_is_one_scene_in_each_kind() -> None:
    assert make_scene(3, "medium") == make_scene(3, "medium") != make_scene(4, "medium")
    assert make_scene(3, "simple").background != make_scene(3, "medium").background


@pytest.mark.parametrize(("kind", "photo"), list(zip(KINDS, PHOTO_KINDS, strict=True)))
def test_photographed_ground_changes_nothing_else(kind: Kind, photo: Kind, renderer: Renderer) -> None:
    plain, on_photo = make_scene(5, kind), make_scene(5, photo)
    assert isinstance(on_photo.background, Photo)
    assert dataclasses.replace(on_photo, kind=kind, background=plain.background) == plain
    assert held_out_questions(on_photo) == held_out_questions(plain)
    first, second = renderer.images([on_photo, plain]).int()
    for thing in plain.objects:
        x = int(thing.cx + (0.7 * thing.radius if thing.shape == "ring" else 0))
        np.testing.assert_array_equal(first[:, int(thing.cy), x].numpy(), second[:, int(thing.cy), x].numpy())


def test_held_out_photographs_stand_behind_held_out_seeds_only() -> None:
    grounds = [[make_scene(first + i, "simple-photo").background for i in range(200)] for first in (0, TRAINING_SEED)]
    held_out, trained = ({ground.name for ground in part if isinstance(ground, Photo)} for part in grounds)
    assert not held_out & trained
    folder = SAMPLES_DIR.parent / "photographs"
    assert held_out | trained == {file.stem for file in folder.glob("*.jpg")}
    uses = re.findall(r"^\| (\w+) \|.*\| (training|held-out scenes) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert {name for name, use in uses if use == "training"} == trained
    assert {name for name, use in uses if use != "training"} == held_out


def test_photograph_is_turned_scaled_and_mirrored(renderer: Renderer) -> None:
    name = "chelsea"
    with Image.open(SAMPLES_DIR.parent / "photographs" / f"{name}.jpg") as picture:
        levels = np.asarray(picture.convert("RGB"), np.float64)
    levels -= levels.mean((0, 1))
    levels = 128 + 20 * (levels / levels.std()).clip(-2.5, 2.5)
    quarter = Photo(name, (0.5, 0.5), 0.75, math.pi / 2, False, (128, 128, 128), 20)
    mirrored = dataclasses.replace(quarter, angle=0, mirrored=True)
    scenes = [Scene("simple-photo", 0, ground, None, ()) for ground in (quarter, mirrored)]
    turned, flipped = renderer.images(scenes).permute(0, 2, 3, 1).numpy()
    middle = levels[56:392, 56:392]  # 336 of 448 pixels: one photographed pixel for each drawn one
    # Down in the photograph is right in the image.
    np.testing.assert_allclose(turned, np.rot90(middle), atol=1)
    np.testing.assert_allclose(flipped, middle[:, ::-1], atol=1)


def test_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown kind of scene 'hard'; known: simple, medium, complex"):
        make_scene(0, "hard")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "least", "most"), [("simple", 1, 2), ("medium", 3, 4), ("complex", 5, 12)])
def test_objects_lie_inside_and_are_as_many_as_the_kind_says(kind: Kind, least: int, most: int) -> None:
    scenes = [make_scene(seed, kind) for seed in range(100)]
    counts = {len(scene.objects) for scene in scenes}
    assert min(counts) >= least
    assert max(counts) == most
    for thing in (o for scene in scenes for o in scene.objects):
        assert thing.shape in SHAPES
        assert thing.color in COLORS
        assert all(thing.radius <= value <= SIZE - thing.radius for value in (thing.cx, thing.cy))


def test_existence_is_answered_by_the_objects() -> None:
    answers = []
    for scene, question in asked("exist"):
        found = re.fullmatch(r"(?:Is there|Do you see) an? ([a-z ]+?)(?: in the image)?\?", question.text)
        assert found, question.text
        names = [name for name, _, _ in named(scene)]
        assert question.answer == ("yes" if found[1] in names else "no"), (scene, question)
        if question.subtype == "adversarial":
            color, shape = found[1].split()
            assert any(o.color == color for o in scene.objects)
            assert any(o.shape == shape for o in scene.objects)
        answers.append(question.answer)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_counts_are_the_objects_numbers() -> None:
    for scene, question in asked("count"):
        found = re.fullmatch(r"How many ([a-z ]+) (?:are there|do you see)\?", question.text)
        assert found, question.text
        assert question.answer == str(counted(scene, found[1])), (scene, question)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("color", r"What (?:color is|is the color of) the (?P<shape>\w+)\?"),
        ("shape", r"What (?:shape )?is the (?P<color>\w+) object\?"),
    ],
)
def test_color_and_shape_are_asked_only_where_one_object_fits(kind: str, pattern: str) -> None:
    for scene, question in asked(kind):
        found = re.fullmatch(pattern, question.text)
        assert found, question.text
        field, value = next(iter(found.groupdict().items()))
        assert [getattr(o, kind) for o in scene.objects if getattr(o, field) == value] == [question.answer]


def test_position_is_the_cell_of_the_only_thing_of_that_name() -> None:
    for scene, question in asked("position"):
        found = re.fullmatch(r"(?:Where is|In which part of the image is) the ([a-z ]+)\?", question.text)
        assert found, question.text
        [(cx, cy)] = [(x, y) for name, x, y in named(scene) if name == found[1]]
        rows = "top" if cy < 112 else "bottom" if cy > 224 else ""
        columns = "left" if cx < 112 else "right" if cx > 224 else ""
        assert question.answer == (f"{rows} {columns}".strip() or "center"), (scene, question)
        assert min(abs(value - border) for value in (cx, cy) for border in (112, 224)) > 8


def test_relation_names_the_nearest_thing_in_its_direction() -> None:
    headings = {"right of": 0.0, "below": 90.0, "left of": 180.0, "above": -90.0}
    for scene, question in asked("relation"):
        found = re.fullmatch(r"What is (?:to the )?(left of|right of|above|below) the ([a-z ]+)\?", question.text)
        assert found, question.text
        [(cx, cy)] = [(x, y) for name, x, y in named(scene) if name == found[2]]
        around = []
        for name, x, y in named(scene):
            turn = math.degrees(math.atan2(y - cy, x - cx)) - headings[found[1]]
            if (x, y) != (cx, cy) and abs((turn + 180) % 360 - 180) < math.degrees(math.atan(0.9)):
                around.append((math.hypot(x - cx, y - cy), name))
        assert question.answer.split(" ", 1)[1] == min(around)[1], (scene, question)


def test_sign_is_read_first_and_only_where_there_is_one() -> None:
    for kind in KINDS:
        for scene in (make_scene(seed, kind) for seed in range(50)):
            read = [(i, q.answer) for i, q in enumerate(held_out_questions(scene)) if q.kind == "sign"]
            assert read == ([(0, scene.sign.text)] if scene.sign else [])


def test_questions_are_distinct_and_the_caption_comes_last() -> None:
    for scene in (make_scene(seed, "complex") for seed in range(50)):
        drawn = held_out_questions(scene, slots=5)
        assert len({q.text for q in drawn}) == len(drawn) == 6
        assert [q.kind for q in drawn].index("caption") == 5
        assert {q.kind for q in drawn} <= set(FAMILIES)


def test_caption_names_everything_from_left_to_right() -> None:
    for scene, question in asked("caption"):
        expected = [name for name, _, _ in sorted(named(scene), key=lambda thing: thing[1])]
        assert mentioned(question.answer) == expected
        assert sorted(present(scene)) == sorted(expected)
        assert caption(scene) == question.answer


def test_mentioned_takes_lists_with_and_and_keeps_repetitions() -> None:
    text = "a red circle, an orange star and a red circle, "
    assert mentioned(text) == ["red circle", "orange star", "red circle"]
    assert mentioned("") == []


@pytest.mark.parametrize(("kind", "seed"), [("simple", 9001), ("complex", 9003)])
def test_sample_is_what_its_seed_draws(kind: Kind, seed: int) -> None:
    scene = make_scene(seed, kind)
    with Image.open(SAMPLES_DIR / f"{kind}-{seed}.png") as committed:
        np.testing.assert_array_equal(np.asarray(render([scene])[0]), np.asarray(committed))
    samples = {sample["file"]: sample for sample in json.loads((SAMPLES_DIR / "samples.json").read_text())}
    drawn = questions(scene, random.Random(seed))
    assert samples[f"{kind}-{seed}.png"] == {
        "file": f"{kind}-{seed}.png",
        "kind": kind,
        "seed": seed,
        "caption": caption(scene),
        "questions": [{"kind": q.kind, "question": q.text, "answer": q.answer} for q in drawn],
    }


def test_batch_row_equals_the_scene_drawn_alone(renderer: Renderer) -> None:
    scenes = [make_scene(11, "complex"), make_scene(1, "simple"), make_scene(12, "complex"), make_scene(2, "medium")]
    assert any(scene.sign for scene in scenes)
    assert any(scene.sign is None for scene in scenes)
    batch = renderer.images(scenes)
    assert batch.shape == (4, 3, SIZE, SIZE)
    for row, scene in enumerate(scenes):
        np.testing.assert_array_equal(batch[row].numpy(), renderer.images([scene])[0].numpy())


def test_pictures_show_each_object_where_the_scene_has_it(renderer: Renderer) -> None:
    scenes = [make_scene(seed, "medium") for seed in range(20)]
    assert {o.shape for scene in scenes for o in scene.objects} == set(SHAPES)
    for scene, image in zip(scenes, renderer.images(scenes), strict=True):
        for thing in scene.objects:
            # A ring is hollow: look at its right side, where the rotation by a small angle changes nothing.
            x = thing.cx + (0.7 * thing.radius if thing.shape == "ring" else 0)
            pixel = image[:, int(thing.cy), int(x)].numpy()
            np.testing.assert_array_equal(pixel, np.rint(thing.rgb), err_msg=f"{scene.seed}: {thing}")


def test_noise_is_shifted_cyclically_and_has_its_strength(renderer: Renderer) -> None:
    ground = dataclasses.replace(
        make_scene(0, "simple").background, base=(128, 128, 128), gradient=(0, 0), noise=20, noise_shift=(0, 0)
    )
    shifted = dataclasses.replace(ground, noise_shift=(30, 7))
    scenes = [Scene("simple", 0, background, None, ()) for background in (ground, shifted)]
    still, moved = renderer.images(scenes).numpy().astype(int)
    np.testing.assert_array_equal(moved, np.roll(still, (-7, -30), axis=(1, 2)))
    assert 18 < still.std() < 21  # clipping at three deviations takes a little away


def test_noise_is_the_one_the_model_was_evaluated_on(renderer: Renderer) -> None:
    image = renderer.images([make_scene(9005, "complex")])[0].float()
    ninths = image.view(3, 3, 112, 3, 112).mean((0, 2, 4))
    expected = [[146.4, 145.6, 151.5], [144.3, 150.2, 141.3], [146.2, 151.8, 151.7]]
    np.testing.assert_allclose(ninths.numpy(), expected, atol=0.1)  # single pixels may round differently by one


def test_inverted_sign_is_the_negative_of_the_plain_one(renderer: Renderer) -> None:
    scene = next(s for s in (make_scene(seed, "simple") for seed in range(50)) if s.sign and not s.sign.inverted)
    assert scene.sign is not None
    inverted = dataclasses.replace(scene, sign=dataclasses.replace(scene.sign, inverted=True))
    plain, negative = renderer.images([scene, inverted]).int()
    x, y = int(scene.sign.cx), int(scene.sign.cy)
    half_width, half_height = int(scene.sign.half_width) - 2, int(scene.sign.half_height) - 2
    plate = (slice(None), slice(y - half_height, y + half_height), slice(x - half_width, x + half_width))
    np.testing.assert_allclose((plain + negative)[plate].numpy(), 256, atol=1)  # each is rounded on its own
    assert plain[plate].min() < 40 < 220 < plain[plate].max()


@pytest.mark.parametrize("text", ["012", "3456", "789"])
def test_sign_shows_its_digits_as_the_sprites_have_them(renderer: Renderer, text: str) -> None:
    width, height, left, top = 32, 50, 100, 120
    half_width, half_height = len(text) * width // 2, height // 2
    sign = Sign(text, left + half_width, top + half_height, height, width, half_width + 9, half_height + 9, False)
    image = renderer.images([dataclasses.replace(make_scene(0, "simple"), objects=(), sign=sign)])[0, 0].numpy()
    with Image.open(SAMPLES_DIR.parent / "digits.png") as sprites:
        for index, digit in enumerate(text):
            sprite = sprites.crop((0, 48 * int(digit), 30, 48 * int(digit) + 48))
            ink = np.asarray(sprite.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
            drawn = image[top : top + height, left + index * width : left + (index + 1) * width]
            np.testing.assert_allclose(drawn, 238 - 220 * ink, atol=2)  # Pillow rounds twice, the renderer once


def test_describing_scenes_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, leanvlm.demo.scenes; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
