"""Own data sets in Detectron2's catalogs, under their specs, and their way to other processes.

A config names data sets by spec, and Detectron2 finds them in its catalogs under that same name.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from collections.abc import Iterable
from multiprocessing.reduction import DupFd
from typing import IO, Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_det.data.datasets.findings import DatasetReport, collector_paused

Record = dict[str, Any]  # one image in Detectron2's format


class PackedRecords:
    """The records of a data set, pickled. Callers modify the records they get, so that each call
    returns new ones; unpickling is several times faster than a deep copy."""

    def __init__(self, packed: bytes | memoryview) -> None:
        self.packed = packed

    def __call__(self) -> list[Record]:
        with collector_paused():
            records: list[Record] = pickle.loads(self.packed)
        return records


class Entry(NamedTuple):
    """One data set as the catalogs hold it."""

    name: str
    packed: bytes | memoryview
    metadata: dict[str, Any]


def add_to_catalogs(name: str, records: list[Record], metadata: dict[str, Any]) -> None:
    """Register a data set, in place of any other of that name."""
    packed = pickle.dumps(records, protocol=pickle.HIGHEST_PROTOCOL)
    add_entries([Entry(name, packed, metadata)])


def add_entries(entries: Iterable[Entry]) -> None:
    """Register data sets that :func:`own_entries` of another process returned."""
    for name, packed, metadata in entries:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)
        DatasetCatalog.register(name, PackedRecords(packed))
        MetadataCatalog.get(name).set(**metadata)


def own_entries(names: Iterable[str]) -> list[Entry]:
    """Those of the named data sets that are registered here and not Detectron2's own."""
    entries = []
    for name in dict.fromkeys(names):
        if name in DatasetCatalog and isinstance(DatasetCatalog[name], PackedRecords):
            metadata = MetadataCatalog.get(name).as_dict()
            metadata.pop("name")
            entries.append(Entry(name, DatasetCatalog[name].packed, metadata))
    return entries


def dataset_report(name: str) -> DatasetReport | None:
    """The report on an own data set; None for Detectron2's own."""
    return MetadataCatalog.get(name).get("report") if name in MetadataCatalog else None


class SharedData:
    """Own data sets of this process, for the processes that it starts with it as an argument.

    The records are in a temporary file without a name, which the processes map: they share its
    memory, no other process can open it, and it vanishes with the last of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        entries = own_entries(names)
        self._sizes = [(name, len(packed), metadata) for name, packed, metadata in entries]
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this)
        for entry in entries:
            self._file.write(entry.packed)
        self._file.flush()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._sizes, DupFd(self._file.fileno())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._sizes, descriptor = state
        self._file = os.fdopen(descriptor.detach(), "rb")

    def register(self) -> None:
        """Register the data sets in this process."""
        if not self._sizes:
            return
        pages = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        start = 0
        for name, size, metadata in self._sizes:
            add_entries([Entry(name, pages[start : start + size], metadata)])
            start += size
