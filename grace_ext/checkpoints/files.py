"""The files of a checkpoint's folder: each is written whole or not at all, and read only if it is what the manifest describes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import Afterwards, CheckpointError
from .statefile import decode

MANIFEST = "manifest.json"
VERSION = 1
OURS = re.compile(r"rank-\d+-of-\d+\.(\d+)\.safetensors(\.tmp)?|manifest\.json\.tmp")


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def make(folder: Path) -> None:
    """Makes the folder of a checkpoint, if there is none. Raises CheckpointError if something else has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{folder} is no folder, or lies in none: give a folder, which is made if it does not exist") from None


def write(path: Path, data: bytes) -> None:
    """Writes all of the data or nothing; it is on the disk on return."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with Afterwards(lambda: temporary.unlink(missing_ok=True)):
            raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    with Afterwards(lambda: os.close(handle)):
        os.fsync(handle)


def read_manifest(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Returns the manifest's bytes and its content. Raises CheckpointError if there is none, or if it is damaged."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: no save was finished there, or it is another host's folder") from None
    try:
        manifest = json.loads(text)
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{folder / MANIFEST} has version {manifest['version']!r}, expected {VERSION}")
        if len(manifest["files"]) != manifest["size"] or not {"generation", "step", "spec"} <= set(manifest):
            raise ValueError("entries are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from None
    return text, manifest


def read(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the state in the file of this entry of the manifest. Raises CheckpointError if the file is damaged."""
    path = folder / Path(entry["name"]).name
    data = path.read_bytes()
    if len(data) != entry["bytes"] or digest(data) != entry["blake2b"]:
        raise CheckpointError(f"{path} is damaged: its {len(data)} bytes are not the {entry['bytes']} that {MANIFEST} describes")
    try:
        return decode(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


def last_generation(folder: Path) -> int:
    """Returns the highest generation in the folder, of finished and unfinished saves; 0 if there is none."""
    numbers = [int(match[1]) for path in folder.iterdir() if (match := OURS.fullmatch(path.name)) and match[1]]
    return max(numbers, default=0)


def check_visible(folder: Path, files: list[dict[str, Any]]) -> None:
    """Raises CheckpointError if this host does not see all of these files."""
    missing = [entry["name"] for entry in files if not (folder / entry["name"]).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {', '.join(missing[:3])}, which other ranks wrote: use a folder that all hosts share (or give each host's "
            "ranks an exchange of their own)"
        )


def remove_others(folder: Path, names: set[str]) -> None:
    """Removes a checkpoint's files from the folder, except those with these names."""
    remove([path for path in folder.iterdir() if OURS.fullmatch(path.name) and path.name not in names])


def remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
