"""How anchors are packed: each one once, in shapes that are few."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.accept.plan import Job, plan_batches, plan_items


def some_jobs(data):
    jobs = []
    for index in range(data.draw(st.integers(1, 12))):
        length = data.draw(st.integers(3, 700))
        count = data.draw(st.integers(1, min(length - 2, 90)))
        anchors = np.sort(np.random.default_rng(index).choice(np.arange(1, length - 1), count, replace=False))
        jobs.append(Job(index=index, length=length, text_hash=index, anchors=anchors.astype(np.int32)))
    return jobs


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_anchor_is_drafted_once_and_fits(data):
    jobs = some_jobs(data)
    per_item, tokens = data.draw(st.sampled_from([1, 7, 16, 64])), data.draw(st.sampled_from([64, 1000, 4096]))
    found = {job.index: [] for job in jobs}
    shapes = {}
    for batch in plan_batches(jobs, tokens_per_batch=tokens, anchors_per_item=per_item):
        assert 1 <= len(batch.jobs) <= batch.num_rows
        assert all(job.length <= batch.width for job in batch.jobs)
        assert batch.num_rows == 1 or batch.num_rows * batch.width <= tokens
        assert batch.anchors_per_row * batch.group <= per_item
        shape = (batch.num_rows, batch.anchors_per_row, batch.group, batch.most_items)
        assert shapes.setdefault(batch.width, shape) == shape
        items = plan_items(batch.jobs, anchors_per_row=batch.anchors_per_row, group=batch.group)
        assert len(items) <= batch.most_items
        for item in items:
            assert item.anchors.shape == (batch.group, batch.anchors_per_row)
            for row, count, anchors in zip(item.rows, item.counts, item.anchors, strict=True):
                found[batch.jobs[row].index] += anchors[:count].tolist()
    assert found == {job.index: job.anchors.tolist() for job in jobs}
    # a width serves sequences down to three quarters of it
    widths = sorted(shapes, reverse=True)
    assert all(low < 0.75 * high for high, low in itertools.pairwise(widths))


def test_few_anchors_per_text_fill_an_item_from_many_texts():
    jobs = [Job(index=i, length=100, text_hash=i, anchors=np.arange(5, 13, dtype=np.int32)) for i in range(10)]
    (batch,) = plan_batches(jobs, tokens_per_batch=4096, anchors_per_item=64)
    assert (batch.width, batch.num_rows, batch.anchors_per_row, batch.group, batch.most_items) == (128, 10, 8, 8, 2)
    items = plan_items(batch.jobs, anchors_per_row=8, group=8)
    assert [item.counts for item in items] == [(8,) * 8, (8, 8, 0, 0, 0, 0, 0, 0)]


def test_many_anchors_stay_together():
    (batch,) = plan_batches(
        [Job(index=0, length=1024, text_hash=0, anchors=np.arange(900, dtype=np.int32))],
        tokens_per_batch=4096,
        anchors_per_item=64,
    )
    assert (batch.num_rows, batch.anchors_per_row, batch.group, batch.most_items) == (1, 64, 1, 15)


def test_a_long_context_takes_fewer_anchors_at_a_time():
    job = Job(index=0, length=131072, text_hash=0, anchors=np.arange(50, dtype=np.int32))
    (batch,) = plan_batches([job], tokens_per_batch=4096, anchors_per_item=64)
    assert (batch.num_rows, batch.anchors_per_row, batch.group, batch.most_items) == (1, 2, 1, 25)
