"""Amounts as people read them: the same on the status page and in a terminal."""


def readable_size(count: float) -> str:
    """So many bytes in the largest unit of 1024 that leaves at least one: as settings are written."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
