"""The responses that a page shows, in the order of their importance.

A page holds few of a store. The worst responses are certainly among them; the others are of prompts
that are spread over all, two of each prompt where there are two, so that they can be compared: the
one of the earliest and the one of the latest version of the student.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, cycle, islice

from logitcask.engine.report.viewer.sources import Response


def choose(responses: Sequence[Response], count: int, prompts: Collection[str] = ()) -> list[int]:
    """Return the indices of at most `count` responses, the most important first.

    Of four one is the worst that is left by its mean KL, and one the worst by its reward; another
    response to its prompt follows each of them, of the most distant version. prompts: responses to
    these come before the spread, as another run has them too.
    """
    by_kl = sorted(
        (i for i, each in enumerate(responses) if each.mean_kl is not None),
        key=lambda i: -_kl(responses[i]),
    )
    by_reward = sorted(
        (i for i, each in enumerate(responses) if each.reward is not None),
        key=lambda i: (responses[i].reward, -_kl(responses[i])),
    )
    of = _by_prompt(responses)
    spread = _spread(of, prompts)
    order = [spread, iter(by_kl), spread, iter(by_reward)]
    chosen: dict[int, None] = {}
    left = set(range(len(responses)))
    for candidates in islice(cycle(order), 4 * (count + len(responses))):
        if len(chosen) >= count or not left:
            break
        found = next((i for i in candidates if i in left), None)
        if found is not None:
            same = of[responses[found].prompt]
            # The spread has pairs already.
            other = found if candidates is spread else same[-1 if found == same[0] else 0]
            chosen |= {found: None, other: None}
            left -= {found, other}
    return list(chosen)[:count]


def _kl(response: Response) -> float:
    return 0.0 if response.mean_kl is None else response.mean_kl


def _by_prompt(responses: Sequence[Response]) -> dict[str, list[int]]:
    """Return prompt -> the indices of its responses, the earliest version first."""
    of: dict[str, list[int]] = {}
    for i, each in enumerate(responses):
        of.setdefault(each.prompt, []).append(i)
    for indices in of.values():
        indices.sort(key=lambda i: responses[i].versions)
    return of


def _spread(of: Mapping[str, list[int]], prompts: Collection[str]) -> Iterator[int]:
    """Yield all indices: two of a prompt at a time, prompts spread from the first to the last."""
    names = sorted(of, key=lambda name: name not in prompts)
    first = sum(name in prompts for name in names)
    order = [*names[:first], *(names[first + i] for i in halves(len(names) - first))]
    pairs = ([of[name][0], *of[name][1:][-1:]] for name in order)
    return chain(chain.from_iterable(pairs), chain.from_iterable(of[name] for name in order))


def halves(count: int) -> list[int]:
    """Return 0 to count - 1 so that every beginning of it is spread evenly over all.

    The order is that of the bits in reverse (van der Corput's sequence).
    """
    width = max(1, (count - 1).bit_length())
    order = (int(f"{i:0{width}b}"[::-1], 2) for i in range(1 << width))
    return [i for i in order if i < count]
