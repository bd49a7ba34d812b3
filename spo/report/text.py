"""Text of users and models, made fit for pages and plots; its content stays readable as it is."""

from __future__ import annotations

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def visible(text: str) -> str:
    """Control characters as signs and lone surrogates replaced; all else unchanged."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROLS)


def plot_label(text: str, length: int = 26) -> str:
    """One short line for a legend or an axis; matplotlib leaves out labels that open with "_"."""
    line = " ".join(visible(text).split()).lstrip("_") or "(unnamed)"
    return line if len(line) <= length else line[: length - 1] + "…"
