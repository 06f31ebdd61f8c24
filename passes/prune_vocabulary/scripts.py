"""Scripts of languages (a helper of the vocabulary pruning pass, not a pass)."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_LATIN = (
    "af az bs ca cs cy da de en es et eu fi fil fr ga gl ha hr hu id is it lt lv ms mt nl no pl pt "
    "ro sk sl so sq sv sw tr uz vi"
)
_CYRILLIC = "be bg kk ky mk mn ru uk"
_ARABIC = "ar fa ps ur"
_DEVANAGARI = "hi mr ne"
LANGUAGES: dict[str, tuple[str, ...]] = dict(
    sorted(
        (
            dict.fromkeys(_LATIN.split(), ("LATIN",))
            | dict.fromkeys(_CYRILLIC.split(), ("CYRILLIC",))
            | dict.fromkeys(_ARABIC.split(), ("ARABIC",))
            | dict.fromkeys(_DEVANAGARI.split(), ("DEVANAGARI",))
            | {
                "am": ("ETHIOPIC",),
                "bn": ("BENGALI",),
                "el": ("GREEK",),
                "gu": ("GUJARATI",),
                "he": ("HEBREW",),
                "hy": ("ARMENIAN",),
                "ja": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"),
                "ka": ("GEORGIAN",),
                "km": ("KHMER",),
                "kn": ("KANNADA",),
                "ko": ("HANGUL", "CJK"),
                "lo": ("LAO",),
                "ml": ("MALAYALAM",),
                "my": ("MYANMAR",),
                "pa": ("GURMUKHI",),
                "si": ("SINHALA",),
                "sr": ("CYRILLIC", "LATIN"),
                "ta": ("TAMIL",),
                "te": ("TELUGU",),
                "th": ("THAI",),
                "zh": ("CJK",),
            }
        ).items()
    )
)
"""The scripts of a language by its ISO 639 code, as names of Unicode characters begin."""


@lru_cache(maxsize=1 << 17)
def _script(character: str) -> str:
    """Return the script of a letter; of marks, digits and punctuation, nothing."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    return unicodedata.name(character, "").split(" ")[0]


def in_scripts(piece: str, scripts: set[str]) -> bool:
    """Say whether all letters of a token are of some scripts."""
    return all(_script(character) in scripts for character in piece if _script(character))
