"""Pages of keys and values: who holds which, what is shared, what is found again."""

from __future__ import annotations

import pytest
import torch

from rlfast.rollout.api import SamplingParams
from rlfast.rollout.kv import Caches, OutOfPages, PagePool
from rlfast.rollout.scheduler import Sample, Scheduler


def test_a_page_is_copied_before_it_is_written_by_one_of_two():
    pool, table = PagePool(8, 4), []
    pool.reserve(table, 6)
    other = pool.fork(table)
    assert other == table and pool.held == 2 and pool.count[table[1]] == 2
    pool.own(other, 5)
    assert other[0] == table[0] and other[1] != table[1] and pool.copies == [(table[1], other[1])]
    pool.own(table, 5)  # alone by now
    assert len(pool.copies) == 1 and pool.held == 3 and pool.count[table[1]] == 1
    pool.release(other), pool.release(table)
    assert pool.held == 0 and pool.free == 8 and table == other == []


def test_all_pages_or_none():
    pool, table, more = PagePool(3, 4), [], []
    pool.reserve(table, 8)
    with pytest.raises(OutOfPages, match="2 pages of 4 positions are wanted, 1 of 3 are free"):
        pool.reserve(more, 5)
    assert more == [] and pool.free == 1


def test_prefixes_are_found_until_their_page_is_needed():
    pool, table, tokens = PagePool(4, 2), [], [1, 2, 3, 4, 5]
    pool.reserve(table, 5)
    pool.publish(table, tokens)
    pages = list(table)
    pool.release(table)
    assert pool.held == 0
    found = pool.find([1, 2, 3, 4, 9, 9])
    assert found == pages[:2] and pool.count[pages[0]] == 1
    assert pool.find([3, 4]) == [] and pool.find([1, 2, 9, 9]) == pages[:1]
    pool.release([pages[0]]), pool.release(found)
    taken = [pool.take() for _ in range(4)]  # the end of a prefix goes before its beginning
    assert taken[2:] == [pages[1], pages[0]] and pool.find([1, 2]) == []
    with pytest.raises(OutOfPages, match="all 4 pages"):
        pool.take()


def test_an_equal_page_after_another_prefix_is_another():
    pool, first, second = PagePool(8, 2), [], []
    pool.reserve(first, 4), pool.reserve(second, 4)
    pool.publish(first, [1, 2, 7, 8])
    pool.publish(second, [3, 4, 7, 8])
    assert pool.find([3, 4, 7, 8]) == second and pool.find([1, 2, 7, 8]) == first
    third = []
    pool.reserve(third, 4)
    pool.publish(third, [1, 2, 7, 8])  # known already: these stay nobody's
    assert pool.find([1, 2, 7, 8]) == first


def test_new_weights_forget_prefixes_but_not_holders():
    pool, table = PagePool(4, 2), []
    pool.reserve(table, 4)
    pool.publish(table, [1, 2, 3, 4])
    pool.forget_all()
    assert pool.find([1, 2]) == [] and pool.held == 2
    pool.release(table)
    assert pool.free == 4 and len(pool.never) == 4


def test_caches_write_and_copy():
    caches = Caches(4, 2)
    k, v = torch.arange(12.0).view(3, 2, 2), torch.arange(6.0).view(3, 2, 1)
    keys, values = caches.write(5, k, v, torch.tensor([1, 2, 7]))
    assert keys.shape == (4, 2, 2, 2) and values.shape == (4, 2, 2, 1)
    assert torch.equal(keys.view(8, 2, 2)[[1, 2, 7]], k) and torch.equal(values.view(8, 2, 1)[[1, 2, 7]], v)
    caches.copy([(3, 0), (1, 2)])
    assert torch.equal(keys[0, 1], k[2]) and torch.equal(keys[2, 0], k[1])


def scheduled(pages: int, size: int = 2, budget: int = 8, most: int = 4) -> Scheduler:
    return Scheduler(PagePool(pages, size), budget, most)


def sample(request: int, length: int, priority: int = 0, index: int = 0) -> Sample:
    prompt = tuple(range(100 * request, 100 * request + length))
    return Sample(request, index, prompt, SamplingParams(priority=priority))


def spans(chunks) -> list[tuple]:
    return [(c.sample.request, c.start, c.stop) for c in chunks]


def test_prompts_in_chunks_and_by_priority():
    one = scheduled(20)
    for s in (sample(0, 5), sample(1, 9, priority=1), sample(2, 3)):
        one.add([s])
    assert spans(one.pick()) == [(1, 0, 8)]
    one.running[0].computed = 8
    assert spans(one.pick()) == [(1, 8, 9), (0, 0, 5), (2, 0, 2)]


def test_the_last_gives_way_when_pages_run_out():
    one = scheduled(4)
    first, second = sample(0, 3), sample(1, 3)
    one.add([first]), one.add([second])
    assert spans(one.pick()) == [(0, 0, 3), (1, 0, 3)] and one.pool.free == 0
    for s in (first, second):
        s.computed = 3
        s.tokens += [7, 8]
    assert spans(one.pick()) == [(0, 3, 5)]
    assert one.waiting == [second] and second.table == [] and second.computed == 0


def test_samples_wait_for_the_first_of_them():
    one = scheduled(20)
    samples = [sample(0, 5, index=i) for i in range(3)]
    one.add(samples)
    assert len(one.pick()) == 1 and len(one.waiting) == 2
    samples[0].computed = 5
    assert one.follow(samples[0]) == samples[1:]
    assert samples[1].table == samples[0].table and one.pool.count[samples[0].table[0]] == 3 and one.waiting == []
    other = [sample(1, 5, index=i) for i in range(3)]
    one.add(other)
    one.finish(other[0])  # cancelled before it began: the next one computes the prompt
    assert other[1].waits_for is None and other[2].waits_for is other[1]
