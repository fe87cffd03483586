"""A bundle's files: its manifest read from the folder and written to it, and every file that it names checked.

A file may be a link, as in the Hub's cache, git-annex or on a second disk; a folder in the bundle may not lead out of it. A
link that leads out counts only if it leads to a regular file that is known by its checksum: its own name holds the sha256 that
the manifest states, as such stores name their files, or its content has it. So nothing is read through a foreign
bundle but what its author already had.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from leanvlm.runtime.console import check_utf8
from leanvlm.runtime.errors import BundleError, ManifestError
from leanvlm.runtime.manifest import MANIFEST, Manifest
from leanvlm.runtime.records import load_json
from leanvlm.runtime.specs import FileSpec

# Read from a bundle by their names, whether the manifest lists them or not.
READ_BY_NAME = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "generation_config.json",
)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `leanvlm.json` into a bundle folder."""
    text = json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False)
    # Renamed when it is whole, so that a full disk leaves the old one.
    new = folder / f".{MANIFEST}.new"
    try:
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(folder / MANIFEST)
    finally:
        new.unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a bundle and check that its files are there, inside the folder and of the stated sizes.

    Raises:
        BundleError: The folder is not a bundle, or a file is missing or has another size.
        ManifestError: The manifest cannot be read, or names a path outside the folder.
        InputError: The folder's name is not UTF-8.
    """
    check_utf8(folder)
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the folder that `leanvlm export` wrote")
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; give the folder that `leanvlm export` wrote")
    manifest = Manifest.from_dict(load_json(path, ManifestError))
    for name, spec in manifest.files.items():
        _check_file(folder, name, spec)
    for name in READ_BY_NAME:
        if name not in manifest.files and leads_out(folder, folder / name):
            raise ManifestError(f"{name} is a link out of the bundle and {MANIFEST} does not list it: remove it")
    return manifest


def _check_file(folder: Path, name: str, spec: FileSpec) -> None:
    path = inside(folder, name)
    if not path.is_file():
        raise BundleError(
            f"the bundle is incomplete: {name} is missing from {folder}, or is no regular file: copy or export the bundle again"
        )
    size = path.stat().st_size
    if size != spec.bytes:
        raise BundleError(f"{name} has {size} bytes where {MANIFEST} says {spec.bytes}: copy or export the bundle again")
    check_link(folder, name, spec.sha256)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that the manifest names; raise ManifestError where that is outside the bundle's folder.

    The file itself may be a link; where it leads is for `check_link`.
    """
    path = folder / name
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or leads_out(folder, path.parent):
        raise ManifestError(f"{MANIFEST} names {name!r}, which is outside the bundle")
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a path in a bundle is in truth somewhere else, links followed."""
    return not path.resolve().is_relative_to(folder.resolve())


def check_link(folder: Path, name: str, sha256: str) -> None:
    """Check that a file of the bundle, where a link leads out to it, is the one whose sha256 the manifest states.

    Raises:
        BundleError: It is another file.
    """
    path = folder / name
    if not leads_out(folder, path):
        return
    real = path.resolve()
    named = re.fullmatch("[0-9a-f]{64}", sha256) is not None and sha256 in real.name
    if not named and file_sha256(real) != sha256:
        raise BundleError(f"{name} is a link to {real}, which is not the file whose sha256 {MANIFEST} states: copy it again")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Compare the sha256 of every file of the bundle, and of the engines that are there, with the manifest.

    Returns:
        The engines that are not there: a device may have been given those for its own GPU only.

    Raises:
        BundleError: A file differs.
    """
    for name, spec in manifest.files.items():
        if file_sha256(folder / name) != spec.sha256:
            raise BundleError(f"{name} does not match its sha256 in {MANIFEST}: copy or export the bundle again")
    absent = []
    for engine in manifest.engines:
        path = inside(folder, engine.file)
        if not path.is_file():
            absent.append(engine.file)
        elif file_sha256(path) != engine.sha256:
            raise BundleError(f"{engine.file} does not match its sha256 in {MANIFEST}: copy or build it again")
    return tuple(absent)
