"""Objects and requests of a store in an object store, by the price classes of the providers.

Put, list and copy requests have one price (S3; class A at Google, write and list operations at
Azure), get requests a lower one (class B; read operations), deletions none. Prices differ by
provider, region and class of storage, so only requests are counted.
"""

from logitcask.engine.store.log.bundles import LEVELS

_LISTS, _GETS = 1, 2
"""List and get requests of one commit, about: where no other process commits at the same time. The
get requests are those of the writer of a bundle."""


def store_requests(units: int) -> dict[str, int]:
    """Return the objects and requests of `units` rollout units and one teacher's scores of them.

    One process without claims. `get_requests` includes the rollouts, and again their lists of ids,
    that scoring reads; `get_requests_per_epoch` is of a training that reads each segment once.
    """
    commits = 2 * units
    made = [commits // level for level in LEVELS]
    # The log keeps the records of the last complete block and those after it.
    records = commits - LEVELS[0] * max(0, made[0] - 1)
    return {
        "segments": commits,
        "objects": commits + records + sum(made) + 1,
        "put_requests": 2 * commits + sum(made) + 1,
        "list_requests": _LISTS * commits,
        "get_requests": _GETS * commits + 2 * units,
        "get_requests_per_epoch": commits,
    }
