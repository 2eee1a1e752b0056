"""Which images make a batch, and which of them are mirrored.

Every batch is a function of (seed, iteration) alone: a run that goes on at any iteration sees what it would have seen.
"""
import numpy as np


class BatchSampler:
    """`batch(iteration)` gives an array of (row, flip) pairs: (batch_size, 2) int64.

    The reference's batch, items of four images: anchor, positive (same id, another photograph when there is one), an
    image of another id, a new_whale. Anchors walk through a shuffled list of all ids, so each id has its turn, however
    few images it has; a pass is num_ids / (batch_size / 4) iterations.

    A mirrored image belongs to another class, so the flip is drawn once for an anchor and its positive: drawn for each
    image alone it would break most of the few positive pairs that a batch has.
    """

    def __init__(self, labels, batch_size, new_whale, seed=0):
        """labels (n,) int of the rows to draw from, -1 for rows left out; `new_whale` is the mark of rows without id."""
        labels = np.asarray(labels)
        rows = np.flatnonzero((labels >= 0) & (labels != new_whale))
        rows = rows[np.argsort(labels[rows], kind='stable')]
        self.ids, first, self.counts = np.unique(labels[rows], return_index=True, return_counts=True)
        self.rows, self.first = rows, first  # images of id i: rows[first[i] : first[i] + counts[i]]
        self.new_whales = np.flatnonzero(labels == new_whale)
        self.batch_size, self.anchors, self.seed = batch_size, batch_size // 4, seed

    @property
    def iterations_per_pass(self):
        return max(1, len(self.ids) // self.anchors)

    def batch(self, iteration):
        """The batch of one iteration: (batch_size, 2) int64, columns row and flip."""
        rng = np.random.default_rng((self.seed, 1, iteration))
        anchors = self._anchors(iteration)  # (P,)
        others = rng.integers(len(self.ids) - 1, size=len(anchors)) if len(self.ids) > 1 else anchors * 0
        others += (others >= anchors) & (len(self.ids) > 1)  # any id but the anchor's, without a set difference
        offset = rng.integers(self.counts[anchors])
        step = rng.integers(np.maximum(self.counts[anchors] - 1, 1)) + 1  # 1..count-1, so never the anchor itself
        positive = (offset + step) % self.counts[anchors]
        ids = np.concatenate([anchors, anchors, others])
        offsets = np.concatenate([offset, positive, rng.integers(self.counts[others])])
        pair, other = rng.integers(2, size=(2, len(anchors)))
        flips = np.concatenate([pair, pair, other])
        item = np.tile(np.arange(len(anchors)), 3)
        rows = self.rows[self.first[ids] + offsets]
        fill = self.batch_size - len(rows)  # new_whale images; more of ids where a data set has no new_whale
        some = self.new_whales if len(self.new_whales) else self.rows
        more = rng.choice(some, size=fill, replace=fill > len(self.new_whales))
        # item after item, each with its share of new_whale, so that equal parts of a batch are small batches of its kind
        place = np.concatenate([(item + 0.5) / len(anchors), (np.arange(fill) + 0.5) / fill])
        batch = np.stack([np.concatenate([rows, more]), np.concatenate([flips, rng.integers(2, size=fill)])], 1)
        return batch[place.argsort(kind='stable')]

    def _anchors(self, iteration):
        """The ids whose turn it is: places iteration * P ... in an endless chain of shuffled lists of all ids."""
        place = iteration * self.anchors + np.arange(self.anchors)
        turn, position = place // len(self.ids), place % len(self.ids)
        orders = {t: np.random.default_rng((self.seed, 0, t)).permutation(len(self.ids)) for t in np.unique(turn)}
        return np.array([orders[t][p] for t, p in zip(turn, position)])
