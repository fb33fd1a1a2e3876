"""Names the compression or container of a file by its first bytes, whatever the file is called."""

MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "LZ4",
    b"\x5d\0\0": "LZMA",
    b"\xff\x06\0\0sNaPpY": "Snappy",
    b"\x1f\x9d": "compress (.Z)",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PAR1": "Parquet",
}


def compression_of(head: bytes) -> str | None:
    """What a file is by its first bytes; None if they are none of the known ones."""
    return next((name for magic, name in MAGICS.items() if head.startswith(magic)), None)
