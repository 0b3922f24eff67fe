"""Tables in markdown, and the places of a page where they stand."""

import re
from collections.abc import Iterable


def markdown(head: list[str], rows: Iterable[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def filled(text: str, made: dict[str, str]) -> str:
    """The page with what stands between `<!-- NAME -->` and `<!-- end -->` written anew, for every
    NAME of `made`."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    names = "|".join(map(re.escape, made))
    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)
