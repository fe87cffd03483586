"""The manifest: written and read back unchanged; whatever is wrong in one is an error that says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from mutations import paths, replaced

from leanvlm.runtime.bundle import file_sha256, read_manifest, verify_files, write_manifest
from leanvlm.runtime.commands.inspection import describe
from leanvlm.runtime.crops import MAX_TILES, CropRule, CropShape
from leanvlm.runtime.errors import BundleError, InputError, LeanVLMError, ManifestError
from leanvlm.runtime.manifest import MANIFEST, SCHEMA, VISION_OUTPUTS, Manifest
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.prompt import Layout
from leanvlm.runtime.records import LIMIT, plain, read
from leanvlm.runtime.specs import (
    RESIZE_INPUTS,
    DecoderSpec,
    FileSpec,
    GraphSpec,
    PrunerSpec,
    ResizeSpec,
    SourceSpec,
    TensorSpec,
    VisionSpec,
)

CONTENTS = {"vision_4.onnx": b"four", "vision_6.onnx": b"six tokens", "decoder.onnx": b"", "embed.safetensors": b"table"}
# sha256 of the four contents above, from coreutils' sha256sum.
CHECKSUMS = {
    "vision_4.onnx": "04efaf080f5a3e74e1c29d1ca6a48569382cbbcd324e8d59d2b83ef21c039f00",
    "decoder.onnx": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}


def graph(file: str, kept: int) -> VisionSpec:
    pixels = TensorSpec("pixel_values", "float32", ("B", 3, 28, 42))
    sizes = {"image_features": ("B", kept, 8), "keep_indices": ("B", kept), "attention": ("B", 6)}
    outputs = tuple(TensorSpec(name, "float32", sizes.get(name, ("B",))) for name in VISION_OUTPUTS)
    return VisionSpec(file, (pixels,), outputs, 0, kept, kept)


def decoder(layers: int = 2, kv_heads: int = 1, head_dim: int = 16, vocab_size: int = 100) -> DecoderSpec:
    """A decoder whose graph has two layers of one head, rows of 8 and a vocabulary of 100."""
    caches = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    inputs = TensorSpec("inputs_embeds", "float32", ("B", "S", 8))
    made = GraphSpec(
        "decoder.onnx",
        (inputs, *(TensorSpec(name, "float32", ("B", 1, "P", 16)) for name in caches)),
        (
            TensorSpec("logits", "float32", ("B", 1, 100)),
            *(TensorSpec(name.replace("past_key_values", "present"), "float32", ("B", 1, "T", 16)) for name in caches),
        ),
    )
    roles = {"inputs_embeds": "embeddings", **{name: name.split(".")[2] for name in caches}}
    return DecoderSpec(made, layers, kv_heads, head_dim, 8, vocab_size, 512, "float32", roles=roles)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with files that stand for a bundle's."""
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return Manifest(
        source=SourceSpec("someone/some-llava", "0123abc", "f" * 64, "llama2", "LICENSE"),
        family="llava",
        pruner=PrunerSpec("agile", {"gate": "erank", "erank_ref": 90.0, "sweeps": 24}),
        budgets=(4, 6),
        crops=CropRule("whole", (CropShape((28, 42), (2, 3)),)),
        layout=Layout(),
        target="cpu",
        precision="int4",
        vision=(graph("vision_4.onnx", 4), graph("vision_6.onnx", 6)),
        decoder=decoder(),
        embed_tokens="embed.safetensors",
        image=ImageSpec(resize=28, crop=(28, 42), image_mean=(0.5, 0.4, 0.3)),
        image_token_id=3,
        positions=PositionRule("compact"),
        min_onnxruntime="1.23",
        versions={"leanvlm": "0.1.0"},
        files={name: FileSpec(len(content), file_sha256(bundle / name)) for name, content in CONTENTS.items()},
        verification={"tokens": {"4": {"equal": 8, "compared": 8}}, "vision": {"4": {"features": 1e-6}}},
    )


@pytest.mark.parametrize("output", ["image_features", "keep_indices"])
@pytest.mark.parametrize("shape", [("B", 5, 8), ("B", "K", 8), ("B",), ()])
def test_a_vision_graph_keeps_as_many_tokens_as_its_budget_says(
    manifest: Manifest, output: str, shape: tuple[int | str, ...]
) -> None:
    right = manifest.vision[0]
    others = tuple(tensor for tensor in right.outputs if tensor.name != output)
    wrong = dataclasses.replace(right, outputs=(*others, TensorSpec(output, "float32", shape)))
    data = dataclasses.replace(manifest, vision=(wrong, *manifest.vision[1:])).to_dict()
    with pytest.raises(ManifestError, match=f"vision_4.onnx is listed as keeping 4 tokens, but its {output} has the shape"):
        Manifest.from_dict(data)


def test_a_manifest_is_read_back_unchanged(bundle: Path, manifest: Manifest) -> None:
    write_manifest(bundle, manifest)
    again = read_manifest(bundle)
    assert again == manifest
    assert again.to_dict() == manifest.to_dict()


def test_its_json_form_is_plain(manifest: Manifest) -> None:
    data = manifest.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert next(iter(data)) == "schema"
    assert set(data) == {field.name for field in dataclasses.fields(Manifest)}
    assert data["schema"] == SCHEMA == 2
    assert data["vision"][0]["outputs"][0]["shape"] == ["B", 4, 8]


def test_names_outside_ascii_are_kept(bundle: Path, manifest: Manifest) -> None:
    source = dataclasses.replace(manifest.source, id="画像-модель")
    write_manifest(bundle, dataclasses.replace(manifest, source=source))
    assert read_manifest(bundle).source.id == "画像-модель"


def test_the_real_bundle_is_read_back_unchanged(demo_bundle: Path) -> None:
    manifest = read_manifest(demo_bundle)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    assert set(manifest.files) == {path.name for path in demo_bundle.iterdir()} - {MANIFEST}
    verify_files(demo_bundle, manifest)


def test_the_budget_is_the_first_or_the_one_asked_for(manifest: Manifest) -> None:
    assert (manifest.budget(None), manifest.budget(4), manifest.budget(6)) == (4, 4, 6)
    with pytest.raises(InputError, match="budget 5 is not in this bundle; it holds 4, 6"):
        manifest.budget(5)


@pytest.mark.parametrize("schema", [None, 0, 1, "2", [2], True])
def test_another_schema_is_refused(manifest: Manifest, schema: object) -> None:
    with pytest.raises(ManifestError, match="this version of leanvlm reads schema 2: export it again"):
        Manifest.from_dict({**manifest.to_dict(), "schema": schema})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": []}, "do not match"),
        ({"budgets": [4]}, "do not match"),
        ({"budgets": [4, 5, 6]}, "do not match"),
        ({"crops": {"kind": "whole", "shapes": [{"pixels": [28, 42], "grid": [2, 4]}]}}, "do not match"),
        ({"crops": {"kind": "whole", "shapes": [{"pixels": [28, 28], "grid": [2, 3]}]}}, "do not fit the first crop shape"),
        ({"crops": {"kind": "whole", "shapes": []}}, "crops: shapes is empty"),
        ({"crops": {"kind": "mosaic", "shapes": []}}, 'crops.kind is "mosaic"; it must be one of'),
        ({"saliency": "random"}, 'saliency is "random"'),
        ({"target": "abacus"}, 'target is "abacus"; it must be one of'),
        ({"positions": {"kept": "random"}}, 'positions.kept is "random"; it must be one of'),
        ({"positions": {"kept": "original", "axes": 3, "image": "grid"}}, "positions of 3 axes are not those"),
        ({"positions": {"kept": "compact", "axes": 3}}, "positions: 3 axes with image line"),
        ({"precision": "fp64"}, "precision fp64 is not one for cpu"),
        ({"colour": 1}, 'has the key "colour", which this version'),
        ({"budgets": [4, 6, 4]}, "do not match|must differ"),
        ({"budgets": [4, 6.0]}, r"budgets\[1\] is 6.0; it must be a whole number"),
        ({"budgets": [True, 6]}, r"budgets\[0\] is true; it must be a whole number"),
        ({"image_token_id": 100}, "image_token_id 100 is beyond 100 tokens"),
        ({"image_token_id": 10**4000}, "image_token_id is a number of 13288 bits; it must be from 0"),
        ({"vision": {"4": {}}}, "vision is an object of 1; it must be a list"),
        ({"embed_tokens": "elsewhere"}, "elsewhere is used but not listed"),
        ({"files": {}}, "is used but not listed"),
        ({"layout": {"mosaic": True, "row_end": "newline"}}, "row_end newline is none of the decoder's extra_rows"),
        ({"layout": {"before_tile": "x" * 257}}, "layout has a text of more than 256 characters"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(manifest: Manifest, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        Manifest.from_dict({**manifest.to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 3}, "decoder: 3 layers do not fit 2 keys and 2 values"),
        ({"layers": 10**12}, "layers is 1000000000000; it must be from 1 to 1024"),
        ({"kv_heads": 2}, r"must be float32 \['any', 2, 'any', 16\]"),
        ({"head_dim": 32}, r"must be float32 \['any', 1, 'any', 32\]"),
        ({"kv_dtype": "float16"}, "must be float16"),
        ({"kv_dtype": "load"}, 'decoder.kv_dtype is "load"; it must be one of'),
        ({"vocab_size": 101}, r"must be float32 \['any', 'any', 101\]"),
        ({"hidden_size": 9}, r"must be float32 \['any', 'any', 9\]"),
        ({"roles": {}}, "roles must name the inputs"),
        ({"roles": {"inputs_embeds": "text"}}, 'decoder.roles.inputs_embeds is "text"'),
        ({"extra_rows": {"newline": 99}}, "extra_rows must be numbered from 100"),
        ({"cache": "appended"}, "has no output new_key_values"),
        ({"cache": "infinite"}, 'decoder.cache is "infinite"'),
    ],
)
def test_a_decoder_is_as_its_graph_says(manifest: Manifest, changes: dict[str, Any], words: str) -> None:
    """Nothing is allocated of sizes that nobody checked."""
    data = manifest.to_dict()
    with pytest.raises(ManifestError, match=words):
        Manifest.from_dict({**data, "decoder": {**data["decoder"], **changes}})


@pytest.mark.parametrize("value", [None, [], {}, "text", -1, 0.5, [[]]], ids=repr)
def test_a_wrong_value_anywhere_is_refused_or_harmless(bundle: Path, manifest: Manifest, value: object) -> None:
    """No other error than ours comes out, and what is accepted can be shown and read back."""
    data, refused = manifest.to_dict(), 0
    for path in paths(data):
        try:
            read = Manifest.from_dict(replaced(data, path, value))
        except ManifestError:
            refused += 1
            continue
        assert Manifest.from_dict(read.to_dict()) == read, path
        assert describe(bundle, read), path
    assert refused > 50


def test_graphs_that_resize_are_two_for_levels(manifest: Manifest) -> None:
    inputs = tuple(TensorSpec(name, "float32", ("A",)) for name in RESIZE_INPUTS)
    outputs = (TensorSpec("crops", "uint8", ("A",)),)
    width, height = (ResizeSpec("decoder.onnx", inputs, outputs, first) for first in ("width", "height"))
    levels = dataclasses.replace(manifest, image=dataclasses.replace(manifest.image, layout="uint8"))
    right = dataclasses.replace(levels, resize=(width, height))
    assert Manifest.from_dict(right.to_dict()) == right
    for wrong, message in (
        (dataclasses.replace(levels, resize=(width,)), "resize must be two graphs, one with each axis first, or none"),
        (dataclasses.replace(levels, resize=(width, width)), "resize must be two graphs"),
        (dataclasses.replace(manifest, resize=(width, height)), "resize makes levels, but the images' layout is float32"),
        (dataclasses.replace(levels, resize=(width, ResizeSpec("x", inputs, outputs, "height"))), "x is used but not listed"),
        (
            dataclasses.replace(levels, resize=(width, ResizeSpec("decoder.onnx", inputs[1:], outputs, "height"))),
            "decoder.onnx has no input levels",
        ),
        (dataclasses.replace(levels, resize=(width, ResizeSpec("decoder.onnx", inputs, (), "height"))), "no output crops"),
    ):
        with pytest.raises(ManifestError, match=message):
            Manifest.from_dict(wrong.to_dict())


def test_a_missing_key_is_refused(manifest: Manifest) -> None:
    data = manifest.to_dict()
    optional = {"engines", "resize", "saliency", "splice", "stages", "verification", "vision_precision"}
    for key in set(data) - optional:
        with pytest.raises(ManifestError):
            Manifest.from_dict({name: value for name, value in data.items() if name != key})
    assert Manifest.from_dict({k: v for k, v in data.items() if k not in optional}).verification == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "\xff", "[" * 100_000, '{"schema": Infinity}', "9" * 5000, " " * (LIMIT + 1)],
    ids=lambda text: text[:8],
)
def test_text_that_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"leanvlm\.json"):
        read_manifest(bundle)


SECRET = b"keys"


def link(bundle: Path, name: str, target: Path) -> None:
    """Put a link in the place of a file."""
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).symlink_to(target)


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not the bundle's, with a file of the same size as one of it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "id_rsa").write_bytes(SECRET)
    assert len(SECRET) == len(CONTENTS["vision_4.onnx"])
    return folder


def test_a_link_to_another_file_is_refused(bundle: Path, manifest: Manifest, outside: Path) -> None:
    write_manifest(bundle, manifest)
    link(bundle, "vision_4.onnx", outside / "id_rsa")
    with pytest.raises(BundleError, match=r"vision_4\.onnx is a link to .*id_rsa, which is not the file whose sha256"):
        read_manifest(bundle)


@pytest.mark.parametrize("stated", ["", "id_rsa", "f" * 64])
def test_a_manifest_cannot_call_another_file_its_own(bundle: Path, manifest: Manifest, outside: Path, stated: str) -> None:
    """Whoever writes a manifest without knowing a file's content does not know its checksum."""
    files = {**manifest.files, "vision_4.onnx": FileSpec(len(SECRET), stated)}
    write_manifest(bundle, dataclasses.replace(manifest, files=files))
    link(bundle, "vision_4.onnx", outside / "id_rsa")
    with pytest.raises(BundleError, match=r"is a link to .*id_rsa"):
        read_manifest(bundle)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_link_that_the_manifest_does_not_list_is_refused(bundle: Path, manifest: Manifest, outside: Path, name: str) -> None:
    write_manifest(bundle, manifest)
    link(bundle, name, outside / "id_rsa")
    with pytest.raises(ManifestError, match=f"{name} is a link out of the bundle"):
        read_manifest(bundle)


def test_a_link_of_the_same_content_counts(bundle: Path, manifest: Manifest, outside: Path) -> None:
    """As on a second disk; a link within the folder is nothing special."""
    write_manifest(bundle, manifest)
    (outside / "weights").write_bytes(CONTENTS["vision_4.onnx"])
    link(bundle, "vision_4.onnx", outside / "weights")
    (bundle / "vision_6.onnx").rename(bundle / "six")
    link(bundle, "vision_6.onnx", Path("six"))
    assert read_manifest(bundle) == manifest


@pytest.mark.parametrize("pattern", ["{}", "SHA256E-s4--{}.onnx"], ids=["the Hub's cache", "git-annex"])
def test_a_link_into_a_store_that_names_files_by_their_checksums_is_not_hashed(
    bundle: Path, manifest: Manifest, outside: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(bundle, manifest)
    blob = outside / pattern.format(CHECKSUMS["vision_4.onnx"])
    blob.write_bytes(CONTENTS["vision_4.onnx"])
    link(bundle, "vision_4.onnx", blob)
    monkeypatch.setattr("leanvlm.runtime.bundle.file_sha256", lambda path: pytest.fail("it was read"))
    assert read_manifest(bundle) == manifest


@pytest.mark.parametrize("target", ["/dev/zero", "nowhere", "."])
def test_only_regular_files_count(bundle: Path, manifest: Manifest, target: str) -> None:
    write_manifest(bundle, manifest)
    link(bundle, "decoder.onnx", Path(target))
    with pytest.raises(BundleError, match=r"decoder\.onnx is missing from .*, or is no regular file"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "name", ["a/../../secret", "../secret", "/etc/passwd", "linked/id_rsa", "a\0b", "here/../vision_4.onnx"]
)
def test_a_name_may_not_leave_the_folder(bundle: Path, manifest: Manifest, outside: Path, name: str) -> None:
    """Nor may a folder in it, even to a file of the stated checksum."""
    (bundle / "linked").symlink_to(outside)
    (bundle / "here").mkdir()
    spec = FileSpec(len(SECRET), file_sha256(outside / "id_rsa"))
    write_manifest(bundle, dataclasses.replace(manifest, files={**manifest.files, name: spec}))
    with pytest.raises(ManifestError, match="which is outside the bundle"):
        read_manifest(bundle)


def test_a_bundle_behind_a_link_is_read(bundle: Path, manifest: Manifest, tmp_path_factory: Any) -> None:
    write_manifest(bundle, manifest)
    link = tmp_path_factory.mktemp("links") / "bundle"
    link.symlink_to(bundle)
    assert read_manifest(link) == manifest


def test_checksums_are_those_of_sha256sum(bundle: Path, manifest: Manifest) -> None:
    assert {name: manifest.files[name].sha256 for name in CHECKSUMS} == CHECKSUMS
    write_manifest(bundle, manifest)
    verify_files(bundle, read_manifest(bundle))


@pytest.mark.parametrize("name", [name for name, content in CONTENTS.items() if content])
def test_a_changed_byte_of_any_file_is_seen(bundle: Path, manifest: Manifest, name: str) -> None:
    write_manifest(bundle, manifest)
    (bundle / name).write_bytes(CONTENTS[name][:-1] + b"!")
    read = read_manifest(bundle)
    with pytest.raises(BundleError, match=f"{name} does not match its sha256"):
        verify_files(bundle, read)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_longer_or_missing_file_is_seen_without_reading_it(bundle: Path, manifest: Manifest, name: str) -> None:
    write_manifest(bundle, manifest)
    (bundle / name).write_bytes(CONTENTS[name] + b"!")
    with pytest.raises(BundleError, match=f"{name} has .* bytes where"):
        read_manifest(bundle)
    (bundle / name).unlink()
    with pytest.raises(LeanVLMError, match=f"{name} is missing"):
        read_manifest(bundle)


TILES = {"kind": "tiles", "shapes": [{"pixels": [28, 42], "grid": [2, 3]}], "arrangements": [[1, 2], [2, 2]]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrangements": []}, "give one or the other"),
        ({"choose": "longest_edge"}, "give one or the other"),
        ({"choose": "longest_edge", "longest_edge": 84}, "give one or the other"),
        ({"choose": "longest_edge", "arrangements": []}, "chosen by longest_edge, which is missing"),
        ({"choose": "longest_edge", "arrangements": [], "longest_edge": 0}, "longest_edge is 0; it must be from 1 to 4096"),
        ({"choose": "longest_edge", "arrangements": [], "longest_edge": 4096}, "would become 14406 crops; at most 256"),
        ({"arrangements": [[1, 257]]}, r"arrangements\[0\]\[1\] is 257; it must be from 1 to 256"),
        ({"arrangements": [[0, 2]]}, r"arrangements\[0\]\[0\] is 0; it must be from 1 to 256"),
        ({"arrangements": [[1, 2.0]]}, r"arrangements\[0\]\[1\] is 2.0; it must be a whole number"),
        ({"arrangements": [[16, 16]], "thumbnail": "last"}, "would become 257 crops; at most 256"),
        ({"shapes": []}, "shapes is empty"),
        ({"shapes": [{"pixels": [4096, 4096], "grid": [2, 3]}]}, "would become 4 crops of 4096 x 4096; they may have 64 megap"),
        ({"fit": "crop"}, 'fit is "crop"; it must be one of'),
        ({"thumbnail": True}, "thumbnail is true"),
        ({"several": None}, "several is null"),
        ({"background": [0, 0, 256]}, r"background\[2\] is 256; it must be from 0 to 255"),
        ({"tile": 3}, 'it has the key "tile"'),
    ],
)
def test_rules_that_do_not_fit_together_are_refused(changes: dict[str, Any], words: str) -> None:
    assert read(CropRule, TILES, "manifest", ManifestError).most == 4
    with pytest.raises(ManifestError, match=words):
        read(CropRule, TILES | changes, "manifest", ManifestError)


def test_the_largest_rules_are_taken() -> None:
    shape = CropShape((28, 28), (2, 2))
    assert CropRule("tiles", (shape,), arrangements=((16, 16),)).most == MAX_TILES
    rule = CropRule("tiles", (shape,), arrangements=((1, 255),), thumbnail="last")
    assert read(CropRule, plain(rule), "manifest", ManifestError) == rule
