"""Text for people: counts, durations, and strings from data, made safe for a terminal."""

from rich.markup import escape


def counted(number: int, noun: str) -> str:
    """`1 unit`, `1,200 units`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock(seconds: float) -> str:
    """`1:02`, or `3:04:05` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain(text: object) -> str:
    """Text that may come from a stranger; control and direction characters become codes."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))


def printable(text: object) -> str:
    """The same, with rich markup escaped."""
    return escape(plain(text))
