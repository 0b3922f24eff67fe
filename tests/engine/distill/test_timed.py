"""The spans of a trainer's updates."""

from pathlib import Path

from logitcask.engine.distill.timed import Updates
from logitcask.engine.types import Detail
from logitcask.engine.workers.timeline import read_timeline, timeline_file


def test_an_update_lasts_until_one_more_is_reported_as_done(tmp_path: Path) -> None:
    updates = Updates(timeline_file(tmp_path, "train", "0"))
    report = updates.watched(lambda *_: None)
    ended = []
    for done in (4, 5):
        updates.begin(round=2, version=done)
        # As the trainer does: before the first pack, after each but the last, after the step.
        for count, detail in (
            (done, Detail()),
            (done, Detail(share=0.5)),
            (done + 1, Detail()),
        ):
            report("train", count, 8, detail)
            ended.append(sum(each.end is not None for each in read_timeline(tmp_path)))
    assert ended == [0, 0, 1, 1, 1, 2]
