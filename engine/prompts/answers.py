r"""Answers in texts: the final answer, its normal form, and the words that contain an answer.

All of it takes time linear in the text.
"""

import re
import unicodedata
from fractions import Fraction

MINUS = "\u2212"
"""The sign of mathematics, which is read as the one of keyboards."""

LONGEST_NUMBER = 400
"""Characters, and the largest decimal exponent: what is longer is compared as text."""


def final_answer(text: str) -> str:
    r"""Return the text in the last \boxed{...}, else after the last "Answer:" or "####" of a line,
    else the last line that is not blank.

    Surrounding $ and one full stop at the end are removed, and runs of blanks become one. Numbers
    are text: 1,000 is not 1000.
    """
    found = _boxed(text)
    if found is None:
        marked = _MARKED.findall(text)
        lines = [line for line in text.splitlines() if line.strip()]
        found = marked[-1] if marked else lines[-1] if lines else ""
    plain = " ".join(found.split()).removesuffix(".").rstrip()
    if len(plain) > 1 and plain[0] == plain[-1] == "$":
        plain = plain.strip("$").strip()
    return plain


_MARKED = re.compile(r"(?:\banswer\s*:|####)[ \t]*(\S.*)", re.IGNORECASE)


def _boxed(text: str) -> str | None:
    """Return the text in the last \\boxed{...} whose braces balance."""
    opened: list[tuple[bool, int]] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace[0] != "{", brace.end()))
        elif opened:
            boxed, start = opened.pop()
            if boxed and (last is None or start > last[0]):
                last = start, brace.start()
    return None if last is None else text[slice(*last)]


_BRACE = re.compile(r"\\boxed\s*\{|[{}]")


def normal_form(answer: str) -> str:
    r"""Return a final answer in its normal form: equal forms are the same answer.

    1. Unicode is composed (NFC), MINUS becomes -, runs of blanks become one.
    2. LaTeX: $, \left, \right and spacing commands are removed, \text{x}, \mathrm{x}, \mathbf{x},
       \textbf{x} and \mbox{x} become x, \dfrac and \tfrac become \frac, \% becomes %, and degrees
       (^\circ, °) after a digit are removed. Then ** and ` around the answer, one pair of quotes,
       and "the" before it are removed; case is folded where no LaTeX command is left.
    3. A number becomes a fraction in lowest terms: an integer, a decimal number, one with exponent,
       with commas (from 1,000 on, every three digits), a quotient a/b or \frac{a}{b} of two of
       them; + or - before it, and % after it, which stays. So 1,000 = 1000.0 = 1e3 and
       0.5 = \frac12 = 2/4, but 50% is not 0.5, and 0.33 is not 1/3. Numbers of more than
       LONGEST_NUMBER characters stay text.
    4. Otherwise blanks next to signs (all but letters, digits and backslashes) are removed.

    Nothing else is equal: no algebra, no units, no mixed numbers, no decimal comma.
    """
    text = " ".join(unicodedata.normalize("NFC", answer).replace(MINUS, "-").split())
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _ARTICLE.sub("", _unquoted(text.strip()))
    if "\\" not in text:
        text = text.casefold()
    return _number(text) or _AROUND_SIGNS.sub(r"\1", text) or answer


_ARTICLE = re.compile(r"^[Tt]he (?=\S)")
_LATEX = [
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,;:!]|\$"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?<=[0-9]) ?(?:\^ ?\\circ(?![A-Za-z])|\^ ?\{ ?\\circ ?\}|°)"), ""),
]
_AROUND_SIGNS = re.compile(r" ?([^\w\s\\]) ?")
_DECIMAL = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"([+-]?) ?(?:({_DECIMAL})(?:[eE]([+-]?[0-9]+))?"
    rf"|({_DECIMAL}) ?/ ?({_DECIMAL})"
    rf"|\\frac ?(?:\{{ ?({_DECIMAL}) ?\}}|([0-9])) ?(?:\{{ ?({_DECIMAL}) ?\}}|([0-9]))) ?(%?)"
)


def _number(text: str) -> str | None:
    """Return a number in lowest terms; None for any other text."""
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if match is None:
        return None
    sign, plain, exponent, above, below, *frac, percent = match.groups()
    if plain is not None:
        power = int(exponent or 0)
        if abs(power) > LONGEST_NUMBER:
            return None
        value = _fraction(plain) * Fraction(10) ** power
    else:
        divisor = _fraction(below or frac[2] or frac[3])
        if not divisor:
            return None
        value = _fraction(above or frac[0] or frac[1]) / divisor
    return f"{-value if sign == '-' else value}{percent}"


def _fraction(decimal: str) -> Fraction:
    digits = decimal.replace(",", "").removesuffix(".")
    return Fraction(digits)


def _unquoted(text: str) -> str:
    """Remove one pair of each kind of marks around a text."""
    for start, end in (("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”")):
        inner = text[len(start) : -len(end)]
        if text.startswith(start) and text.endswith(end) and inner.strip() and start not in inner:
            text = inner.strip()
    return text


def words(text: str) -> list[str]:
    """Return the words of a text, composed (NFC) and case folded.

    A word is a run of letters, digits and their marks; every other character divides. Single . , /
    and : between two digits do not, and - or . before a digit that begins a word belongs to it: 5
    is no word of 5.5, 1/5, 12:05, .5 or -5. Each character is a word where the script writes no
    blanks between them: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold().translate(_CHARACTERS))


def contains_words(text: str, answer: str) -> bool:
    """Return whether the words of an answer follow one another in a text; False without any."""
    found = words(answer)
    return bool(found) and f" {' '.join(found)} " in f" {' '.join(words(text))} "


_PART = r"[^\s.,/:\-]"
_WORD = re.compile(
    rf"(?:(?<!{_PART})-)?(?:(?<![^\s\-])\.)?(?=[0-9]){_PART}+(?:(?<=[0-9])[.,/:](?=[0-9]){_PART}+)*"
    rf"|{_PART}+(?:(?<=[0-9])[.,/:](?=[0-9]){_PART}+)*"
)
_NO_BLANKS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF)),
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)
"""Ranges of code points: Thai and Lao, Burmese, Khmer, kana, Chinese characters."""


class _Characters(dict[int, str]):
    """Code point -> what `words` reads, found when it first occurs."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character in ".,/:-":
            found = character
        elif character == MINUS:
            found = "-"
        elif any(first <= code <= last for first, last in _NO_BLANKS):
            found = f" {character} "
        elif character.isalnum() or unicodedata.category(character).startswith("M"):
            found = character
        else:
            found = " "
        self[code] = found
        return found


_CHARACTERS = _Characters()
