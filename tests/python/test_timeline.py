"""pool.timeline(): readings equal to the statistics, as a CSV file and as a picture."""

from __future__ import annotations

import csv

import pytest
import torch

import elastikv
from elastikv.timeline import COLUMNS, TimelineSample

RARELY = 3600.0  # one reading at the start and one at the end


def test_last_reading_is_what_the_statistics_say(shared, model, page_size):
    other = shared.register_model("other", virtual_capacity=64 * page_size)
    timeline = shared.timeline(RARELY)
    kept = elastikv.empty((3, page_size), (16, page_size), torch.uint8, model)
    shared.allocate_for_model("other", page_size)
    other.set_quota(limit=9 * page_size)
    timeline.stop()
    last = {sample.model: sample for sample in timeline.samples()[-2:]}
    assert set(last) == {"model", "other"}
    for each in (model, other):
        sample, stats = last[each.name], each.stats()
        assert (sample.used, sample.stranded) == (stats.used, stats.stranded)
        assert sample.physical == stats.physical_usage
        assert sample.limit == each.quota().limit
        assert sample.pool_limit == shared.global_stats().physical_limit
    assert kept.shape[0] == 3 and not timeline.running


def test_csv_has_every_sample(shared, model, page_size, tmp_path):
    with shared.timeline(interval=0.001) as timeline:
        shared.allocate_for_model("model", page_size)
    path = timeline.to_csv(tmp_path / "run.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS == TimelineSample._fields
    read = [TimelineSample(float(r["seconds"]), r["model"], *(int(r[name]) for name in COLUMNS[2:])) for r in rows]
    assert [sample[1:] for sample in read] == [sample[1:] for sample in timeline.samples()]
    assert [sample.seconds for sample in read] == sorted(sample.seconds for sample in read)


@pytest.mark.parametrize("models", [1, 9])
def test_picture(device, page_size, tmp_path, models):
    pytest.importorskip("matplotlib")
    with elastikv.SharedMemoryPool(64 * page_size, device) as shared, shared.timeline(0.001) as timeline:
        for index in range(models):
            shared.register_model(f"model {index}", 64 * page_size)
            shared.allocate_for_model(f"model {index}", page_size)
    path = timeline.plot(tmp_path / "run.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_recorded_is_nothing_to_draw(device, page_size, tmp_path):
    with elastikv.SharedMemoryPool(page_size, device) as shared, shared.timeline() as timeline:
        pass
    assert timeline.samples() == []
    assert timeline.to_csv(tmp_path / "run.csv").read_text().splitlines() == [",".join(COLUMNS)]
    with pytest.raises(elastikv.InvalidArgument, match="nothing to draw"):
        timeline.plot(tmp_path / "run.png")


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), 1e6])
def test_intervals_that_are_none(shared, interval):
    with pytest.raises(elastikv.InvalidArgument, match="interval of a timeline"):
        shared.timeline(interval)


def test_a_recording_outlives_its_pool(device, page_size):
    shared = elastikv.SharedMemoryPool(8 * page_size, device)
    shared.register_model("model", 64 * page_size)
    timeline = shared.timeline(RARELY)
    shared.allocate_for_model("model", page_size)
    del shared
    assert timeline.running
    timeline.stop()
    assert timeline.samples()[-1].used == page_size
