"""Tar files whose headers lie about sizes, kinds and names."""

import io
import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.attack.pictures import _POSTSCRIPT, _encoded

Case = tuple[str, bytes]
_PICTURE = _encoded(".jpg")


def _member(name: str, content: bytes = _PICTURE, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    head = info.tobuf(tarfile.PAX_FORMAT)
    return head + content + bytes(-len(content) % 512)


def _size(member: bytes, size: bytes) -> bytes:
    """The same with other bytes for the size, and a checksum that fits."""
    head = bytearray(member[:512])
    head[124:136] = size.ljust(12, b"\0")[:12]
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + member[512:]


def _base256(value: int) -> bytes:
    return ((1 << 95) | (value & ((1 << 95) - 1))).to_bytes(12, "big")


def cases(proof: Path) -> Iterator[Case]:
    """Whole archives, most of them with two honest pictures before the hostile member."""
    honest, end = _member("a.jpg") + _member("b.jpg"), bytes(1024)
    plain = _member("c.jpg")
    for name, size in (
        ("-512 bytes", _base256(-512)),
        ("-1 bytes", _base256(-1)),
        ("-2^62 bytes", _base256(-(1 << 62))),
        ("2^62 bytes", _base256(1 << 62)),
        ("2^90 bytes", _base256(1 << 90)),
        ("2^33 bytes", b"77777777777"),
        ("text for a size", b"hello"),
        ("no size", b""),
        ("spaces for a size", b"           "),
        ("a negative octal size", b"-1000"),
    ):
        yield f"a member of {name}", honest + _size(plain, size) + end
        yield f"a first member of {name}", _size(plain, size) + honest + end
    kinds = {
        "a link": b"2",
        "a hard link": b"1",
        "a device": b"3",
        "a pipe": b"6",
        "a folder": b"5",
        "a block device": b"4",
        "sparse": b"S",
        "an unknown kind": b"Z",
    }
    for name, kind in kinds.items():
        for target in ("/etc/passwd", "../../x", str(proof), "a.jpg", "c.jpg"):
            fields = {"type": kind, "linkname": target}
            yield f"{name} to {target[-12:]}", honest + _member("c.jpg", **fields) + end
    for name in (
        "../../../x.jpg",
        "/tmp/x.jpg",
        "a/../../x.jpg",
        "x\ny.jpg",
        "\x1b[31m.jpg",
        "-rf.jpg",
        "a.jpg",
        ".jpg",
        "",
        "x" * 250 + ".jpg",
        "é.jpg",
        "CON.jpg",
        "|touch x.jpg",
    ):
        yield f"a member called {name[:16]!r}", honest + _member(name) + end
    for kind in (b"L", b"K", b"x", b"g", b"X"):
        for size in (1 << 33, 1 << 30, 1 << 62):
            lie = _size(_member("n", b"x" * 512, type=kind), _base256(size))
            yield f"a description ({kind!r}) of {size} bytes", honest + lie + plain + end
        yield (
            f"a description ({kind!r}) of noise",
            honest + _member("n", os.urandom(512), type=kind) + (plain + end),
        )
        chain = _member("n", b"x" * 100, type=kind) * 3_000
        yield f"3,000 descriptions ({kind!r})", honest + chain + plain + end
    for text in (
        b"30 size=-1\n",
        b"22 size=99999999999999\n",
        b"9" * 300 + b" a=b\n",
        b"0 a=b\n",
        b"-5 a=b\n",
        b"20 size=abc\n",
        b"28 GNU.sparse.major=1\n",
        b"40 GNU.sparse.map=0,1,x\n",
        b"22 path=../../x.jpg\n",
        b"26 hdrcharset=BINARY\n",
        b"17 mtime=nan\n",
        b"33 GNU.sparse.size=99999999999\n",
    ):
        pax = _member("p", text, type=b"x")
        yield f"a pax header {text[:20]!r}", honest + pax + plain + end
        yield f"a first pax header {text[:20]!r}", pax + honest + end
    yield "a cut member", honest + plain[:700]
    yield "a cut header", honest + plain[:100]
    yield "no end", honest
    yield "noise", os.urandom(20_000)
    yield "zeros", bytes(20_000)
    yield "nothing", b""
    yield "noise behind pictures", honest + os.urandom(5_000)
    yield "PostScript", honest + _member("c.jpg", _POSTSCRIPT) + end
    yield "a pickle called .npy", honest + _member("c.npy", b"cos\nsystem\n(Vtouch x\ntR.") + end
    yield "a tar in a tar", honest + _member("c.jpg", honest + end) + end
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo("x.jpg")
            info.size = 50_000_000
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        yield "a gzip bomb", buffer.getvalue()
    yield "gzip that is cut", b"\x1f\x8b\x08\x00" + bytes(6) + os.urandom(200)
    yield "20,000 empty members", honest + _member("e.jpg", b"") * 20_000 + end
    yield "a header with a wrong checksum", honest + bytes(1) + plain[1:] + end
    yield "only folders", _member("d", b"", type=b"5") * 100 + end
    yield (
        "a size of 1 TB with zip64-like noise",
        honest + _size(plain, struct.pack(">Q", 1 << 40)) + end,
    )
