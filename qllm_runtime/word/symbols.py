"""Characters of symbol fonts, which Word files hold as numbers within the font."""

from __future__ import annotations

import re

# https://www.unicode.org/Public/MAPPINGS/VENDORS/ADOBE/symbol.txt, from 0x20 to 0x7e and from 0xa0 to 0xfe
_SYMBOL = dict(
    zip(
        (*range(0x20, 0x7F), *range(0xA0, 0xFF)),
        " !∀#∃%&∋()∗+,−./0123456789:;<=>?"
        "≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_"
        "‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
        "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵"
        "ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓"
        "◊〈®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪\uf8ff〉∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭",
        strict=True,
    )
)
# what forms are ticked with, and arrows
_FONTS: dict[str, dict[int, str]] = {
    "symbol": _SYMBOL,
    "wingdings": dict(zip(b"\x6c\x6e\x6f\x71\x78\xa7\xa8\xdf\xe0\xf3\xfb\xfc\xfd\xfe", "●■☐❑☒▪☐←→↔✗✓☒☑", strict=True)),
    "wingdings 2": dict(zip(b"\x4f\x50\x51\x52\x53\x54\xa3", "✗✓☒☑☒☒☐", strict=True)),
}
_PRIVATE = re.compile("[\uf020-\uf0ff]")


def symbol(font: str | None, code: int) -> str:
    """The character with this number in a font, U+FFFD for one that is not known."""
    private = 0xF000 <= code <= 0xF0FF
    known = _FONTS.get((font or "").lower(), {}).get(code & 0xFF if private else code)
    if known is not None:
        return known
    return "\ufffd" if private or not 0x20 <= code < 0x110000 or 0xD800 <= code < 0xE000 else chr(code)


def plain(text: str, font: str | None) -> str:
    """A text whose symbols are numbers within a font, with characters in their place."""
    return _PRIVATE.sub(lambda found: _known(font, found[0]), text)


def _known(font: str | None, character: str) -> str:
    found = symbol(font, ord(character))
    return character if found == "\ufffd" else found
