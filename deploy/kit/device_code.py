"""Device code of one compute capability in an extension module.

An extension module of CUDA holds its kernels in "fat binaries": containers of machine code for many GPUs, and of PTX that a
driver compiles. What other GPUs need is overwritten with zeros here. The file keeps its size and its headers, so it loads as
before; but zeros compress to nothing.

Format: cuda/targets/x86_64-linux/include/fatbinary_section.h, and `cuobjdump --list-elf` to compare with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = struct.pack("<I", 0xBA55ED50)
#: Magic, version, size of this header, size of what follows it.
_CONTAINER = struct.Struct("<IHHQ")
#: Kind, version, size of this header, size of the code that follows it, 12 bytes of no interest, architecture.
_ENTRY = struct.Struct("<HHIQ12xI")
_PTX, _MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class Code:
    """`architecture`: 90 for compute capability 9.0. The code is at data[start:end]."""

    kind: int
    architecture: int
    start: int
    end: int


def containers(data: bytes) -> Iterator[list[Code]]:
    """The fat binaries of an extension module."""
    at = data.find(_MAGIC)
    while at >= 0:
        end = at + 4  # where the search goes on: these four bytes may mean something else
        if at + _CONTAINER.size <= len(data):
            _, version, header, size = _CONTAINER.unpack_from(data, at)
            if version == 1 and header == _CONTAINER.size and at + header + size <= len(data):
                end = at + header + size
                yield list(_entries(data, at + header, end))
        at = data.find(_MAGIC, end)


def _entries(data: bytes, at: int, end: int) -> Iterator[Code]:
    while at + _ENTRY.size <= end:
        kind, _, header, size, architecture = _ENTRY.unpack_from(data, at)
        if header < _ENTRY.size:  # no entry after all
            return
        yield Code(kind, architecture, at + header, at + header + size)
        at += header + size


def only_for(architecture: int, data: bytes) -> bytes:
    """The module without code that GPUs of this architecture do not use: they take machine code of their own if there is any,
    else that of an earlier minor version, else they compile PTX."""
    kept = bytearray(data)
    for codes in containers(data):
        runs = [code for code in codes if code.kind == _MACHINE_CODE and _runs_on(architecture, code.architecture)]
        wanted = runs or [code for code in codes if code.kind == _PTX and code.architecture <= architecture]
        for code in codes:
            if code not in wanted:
                kept[code.start : code.end] = bytes(code.end - code.start)
    return bytes(kept)


def has_code_for(architecture: int, data: bytes) -> bool:
    """The module has code that GPUs of this architecture take, and it is not zeros."""
    return any(
        _runs_on(architecture, code.architecture) and any(data[code.start : code.end])
        for codes in containers(data)
        for code in codes
        if code.kind == _MACHINE_CODE
    )


def _runs_on(architecture: int, code: int) -> bool:
    return code // 10 == architecture // 10 and code <= architecture
