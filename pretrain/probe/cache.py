"""Arrays on the disk that know what they were computed from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.files import replace_text, replacing


class ArrayCache:
    """Two files an array: ``NAME.npy``, read as a memory map, and ``NAME.json``, its key.

    The key is written last and removed first, each file appears whole or not at all, so an array
    is only ever found under the key that it was computed for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(
        self, name: str, key: dict[str, Any]
    ) -> tuple[np.ndarray | None, dict[str, Any], list[str]]:
        """The array and the notes kept with it, if it was computed for this very key.

        Returns:
            array (None if there is none), its notes, and the names of the parts of the key that
            changed since it was written (empty where nothing was there).
        """
        try:
            content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            old, notes = content["key"], content["notes"]
            changed = [part for part in key if old.get(part) != key[part]]
            if changed:
                return None, {}, changed
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="c")
        except FileNotFoundError:
            return None, {}, []
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, {}, ["the file, which is damaged"]
        return array, notes, []

    @contextmanager
    def create(
        self, name: str, key: dict[str, Any], shape: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """A float32 array to fill and a dictionary of notes to keep with it; both are kept when
        the block ends without an error."""
        self.folder.mkdir(parents=True, exist_ok=True)
        notes: dict[str, Any] = {}
        with replacing(self.folder / f"{name}.npy") as unfinished:
            array = np.lib.format.open_memmap(unfinished, "w+", dtype=np.float32, shape=shape)
            yield array, notes
            array.flush()
            (self.folder / f"{name}.json").unlink(missing_ok=True)
        replace_text(self.folder / f"{name}.json", json.dumps({"key": key, "notes": notes}))
