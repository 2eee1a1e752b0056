import numpy as np

from data.sampler import BatchSampler

NEW = 40  # the mark of new_whale for 20 ids


def table():
    """20 ids with 1..6 images, 30 new_whale images, 5 rows left out."""
    labels = [i for i in range(20) for _ in range(1 + i % 6)] + [NEW] * 30 + [-1] * 5
    return np.random.default_rng(0).permutation(labels)


def test_items_are_anchor_positive_other_and_stranger():
    labels = table()
    sampler = BatchSampler(labels, 24, NEW, seed=3)
    for iteration in range(50):
        rows, flips = sampler.batch(iteration).T
        anchor, positive, other, stranger = labels[rows].reshape(6, 4).T
        assert (anchor == positive).all() and (anchor != other).all() and (stranger == NEW).all()
        many = np.isin(anchor, [i for i in range(20) if 1 + i % 6 > 1])
        a, p = rows[::4], rows[1::4]
        assert (a != p)[many].all() and (a == p)[~many].all()
        assert (flips[::4] == flips[1::4]).all()


def test_flips_are_even_and_drawn_for_each_item():
    sampler = BatchSampler(table(), 24, NEW)
    flips = np.stack([sampler.batch(i)[:, 1] for i in range(300)])
    assert abs(flips.mean(0) - 0.5).max() < 0.15
    assert 0.1 < flips[:, ::4].std(1).mean()


def test_images_of_an_id_are_counted_in_the_order_of_the_table():
    """So that a batch is the same on any machine."""
    labels = np.tile(table(), 5)
    sampler = BatchSampler(labels, 24, NEW)
    for number, first, count in zip(sampler.ids, sampler.first, sampler.counts):
        assert sampler.rows[first:first + count].tolist() == np.flatnonzero(labels == number).tolist()


def test_pairs_and_others_are_drawn_evenly_each_for_itself():
    labels = table()
    sampler = BatchSampler(labels, 24, NEW)
    items = np.concatenate([sampler.batch(i)[:, 0].reshape(6, 4) for i in range(600)])
    anchor, positive, other, _ = items.T
    for number in np.unique(labels[labels >= 0])[:-1]:
        rows = np.flatnonzero(labels == number)
        others = labels[other[labels[anchor] == number]]
        assert len(np.unique(others)) == 19 and number not in others  # any other id
        pairs = {(a, p) for a, p in zip(anchor, positive) if a in rows}
        assert len(pairs) == max(1, len(rows) * (len(rows) - 1))  # and any two photographs, in either order
    share = np.bincount(labels[other], minlength=20) / len(items)
    assert abs(share - 0.05).max() < 0.02
    assert (np.diff(labels[other].reshape(600, 6)) != 0).mean() > 0.9


def test_new_whales_are_repeated_only_where_they_are_too_few():
    for number, different in [(6, 6), (7, 6), (2, 2)]:
        sampler = BatchSampler(np.repeat([0, 1, 2, NEW], [3, 3, 3, number]), 24, NEW)
        for iteration in range(20):
            strangers = sampler.batch(iteration)[3::4, 0]
            assert strangers.min() >= 9 and (len(set(strangers)) == different or number == 2)


def test_every_id_has_its_turn():
    labels = table()
    sampler = BatchSampler(labels, 16, NEW)
    assert sampler.iterations_per_pass == 5
    anchors = np.concatenate([labels[sampler.batch(i)[::4, 0]] for i in range(15)])
    assert (np.bincount(anchors, minlength=20) == 3).all()


def test_a_batch_depends_on_seed_and_iteration_alone():
    sampler = BatchSampler(table(), 24, NEW, seed=5)
    straight = [sampler.batch(iteration) for iteration in range(8)]
    later = BatchSampler(table(), 24, NEW, seed=5).batch(7)
    assert (straight[7] == later).all()
    assert (straight[7] != straight[6]).any()
    assert (BatchSampler(table(), 24, NEW, seed=6).batch(7) != later).any()


def test_rows_left_out_are_never_drawn():
    labels = table()
    sampler = BatchSampler(labels, 24, NEW)
    seen = np.unique(np.concatenate([sampler.batch(i)[:, 0] for i in range(100)]))
    assert (labels[seen] >= 0).all()
    assert len(seen) == (labels >= 0).sum()  # and all others are


def test_without_new_whales_and_with_few_ids():
    assert BatchSampler(np.array([0, 0, 0]), 8, 2).batch(0).shape == (8, 2)
    rows = BatchSampler(np.arange(12), 8, 24).batch(3)[:, 0]
    assert rows.max() < 12
    two = np.array([0, 0, 1, 1, 4])
    anchor, positive, other, stranger = two[BatchSampler(two, 8, 4).batch(0)[:, 0]].reshape(2, 4).T
    assert (anchor == positive).all() and (other == 1 - anchor).all() and (stranger == 4).all()


def test_the_smallest_batches():
    labels = table()
    anchor, positive, other, stranger = labels[BatchSampler(labels, 4, NEW).batch(0)[:, 0]]
    assert anchor == positive != other and other != stranger == NEW
