"""The endless order: a permutation an epoch, local within windows, the same from any start and for any worker count."""

import copy

import numpy as np
import pytest

from litevae.order import EpochOrder

GROUPS = [5, 1, 0, 7, 3, 4, 4, 9, 2, 6]
ROWS = sum(GROUPS)


def test_every_epoch_is_another_permutation():
    order = EpochOrder(GROUPS, seed=3, window=10)
    assert len(order) == ROWS
    epochs = [[order.index(epoch * ROWS + i) for i in range(ROWS)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [EpochOrder(GROUPS, seed=4, window=10).index(i) for i in range(ROWS)] != epochs[0]


def test_rows_of_a_lone_group_come_otherwise_in_each_epoch_and_window():
    order = EpochOrder([20], seed=3, window=20)
    assert len({tuple(order.index(20 * epoch + i) for i in range(20)) for epoch in range(5)}) == 5
    order = EpochOrder([20] * 5, seed=3, window=20)
    assert len({tuple(order.index(20 * n + i) % 20 for i in range(20)) for n in range(5)}) == 5


def test_any_position_directly():
    order = EpochOrder(GROUPS, seed=3, window=10)
    straight = [order.index(i) for i in range(3 * ROWS)]
    jumps = np.random.default_rng(0).permutation(3 * ROWS)
    fresh = copy.deepcopy(EpochOrder(GROUPS, seed=3, window=10))
    assert [fresh.index(int(i)) for i in jumps] == [straight[i] for i in jumps]
    for workers in (1, 2, 3, 5):  # the ranks' strides interleave to the same global order
        ranks = [[order.index(p) for p in range(7 + r, 7 + 60, workers)] for r in range(workers)]
        assert [ranks[i % workers][i // workers] for i in range(60)] == straight[7:67]


def test_windows_tell_their_groups():
    order = EpochOrder(GROUPS, seed=3, window=10)
    starts = np.cumsum(GROUPS) - GROUPS
    for epoch in (0, 2):
        position, seen = epoch * ROWS, []
        while position < (epoch + 1) * ROWS:
            begin, groups = order.window_at(position)
            assert begin == position
            size = sum(GROUPS[group] for group in groups)
            rows = sorted(order.index(position + n) for n in range(size))
            assert rows == sorted(row for g in groups for row in range(starts[g], starts[g] + GROUPS[g]))
            assert all(order.window_at(position + n)[0] == begin for n in range(size))
            seen += [*groups]
            position += size
        assert sorted(seen) == [group for group, size in enumerate(GROUPS) if size or group in seen]


@pytest.mark.parametrize(("size", "window"), [(8, 32), (8, 30), (8, 1), (100, 32)])
def test_rows_stay_within_few_groups(size, window):
    groups = [size] * 20
    order = EpochOrder(groups, seed=0, window=window)
    at_once = max(1, -(-window // size))  # groups that fill a window
    rows = np.array([order.index(i) for i in range(size * 20)])
    loads, held = 0, []
    for group in rows // size:
        if group not in held:
            loads, held = loads + 1, [*held, group][-at_once - 1 :]
    assert loads <= 20 + 20 // at_once  # every group once, and again at most at a window's edge
    assert rows.tolist() != sorted(rows.tolist())


def test_single_files_are_shuffled_across_everything():
    order = EpochOrder(np.ones(1000, dtype=np.int64), seed=0, window=1000)
    rows = np.array([order.index(i) for i in range(1000)])
    assert abs(np.corrcoef(rows, np.arange(1000))[0, 1]) < 0.1


PINNED = {
    1: [8, 5, 6, 0, 2, 7, 1, 4, 3, 4, 6, 5, 7, 8, 3, 2, 1, 0],
    2: [8, 7, 5, 0, 1, 2, 6, 4, 3, 8, 5, 4, 6, 7, 3, 2, 1, 0],
}


@pytest.mark.parametrize("version", PINNED)
def test_the_order_is_fixed_for_ever(version):
    """A resumed run must see the order of the version that started it."""
    order = EpochOrder([3, 2, 4], seed=7, window=5, version=version)
    assert [order.index(i) for i in range(18)] == PINNED[version]
    assert EpochOrder([3], seed=7, window=5).version == max(PINNED)


@pytest.mark.parametrize(("version", "expected"), [(1, 2.0), (2, 1.0)])
def test_groups_and_rows_are_shuffled_apart(version, expected):
    """A random permutation leaves one row in its place on average; the square of one leaves two."""
    order = EpochOrder(np.ones(9, dtype=np.int64), seed=0, window=9, version=version)
    in_place = np.mean([sum(order.index(9 * epoch + i) == i for i in range(9)) for epoch in range(3000)])
    assert abs(in_place - expected) < 0.1


def test_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        EpochOrder([0, 0], seed=0, window=4)
