"""Text for people: counts, durations, and strings from data, made safe for a terminal."""

from rich.markup import escape


def counted(number: int, noun: str) -> str:
    """`1 unit`, `1,200 units`, `2 classes`, `2 copies`."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of an English noun that is formed by rule."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def percent(share: float) -> str:
    """A share from 0 to 1 as `11.5 %`; a small one keeps two digits: `0.012 %`."""
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else f"{100 * share:.2g} %"


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
