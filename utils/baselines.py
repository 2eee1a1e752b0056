"""What doing no learning scores: `python -m utils.baselines DATA_DIR`; the truth is its test_labels.csv.

Each test image gets the ids of its most similar training images, by pixels or by histograms of oriented
gradients (HOG, Dalal and Triggs 2005), on the network's box crops; thresholds come from training labels alone.
"""
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from data.decode import read_image
from data.images import cut_crop, raw_size
from data.tables import load_tables, read_labels
from utils.errors import UserError, exit_clearly
from utils.metrics import NEW_WHALE, choose_threshold, map_at_5, rank_of_truth

height, width = 64, 128     # of the grey crops; half of that for pixels
cell, bins = 8, 9           # HOG: pixels on a cell's side, directions in half a turn


def grey_crops(frame):
    """The boxes of a table's images: (n, height, width) float32 grey, 0..255."""
    size = raw_size(height, width)
    y, x = (size[0] - height) // 2, (size[1] - width) // 2      # the surroundings that cut_crop adds
    crops = np.zeros((len(frame), height, width), np.float32)
    for row, (path, *box) in enumerate(frame[['path', 'x0', 'y0', 'x1', 'y1']].itertuples(index=False)):
        image = read_image(path)
        crop, _ = cut_crop(image, np.zeros(image.shape[:2], np.uint8), np.array(box, float), *size)
        crops[row] = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[y:y + height, x:x + width]
    return crops


def pixel_features(crops):
    """Grey images of half the size, mean 0 and length 1: (n, H, W) -> (n, H * W / 4)."""
    small = torch.nn.functional.avg_pool2d(torch.from_numpy(crops)[:, None], 2).flatten(1)
    return normalize(small - small.mean(1, keepdim=True))


def hog_features(crops):
    """Histograms of oriented gradients, length 1: (n, H, W), multiples of `cell`, -> (n, blocks * 4 * bins)."""
    dy, dx = np.gradient(crops, axis=(1, 2))
    turn = (np.arctan2(dy, dx) % np.pi) / np.pi * bins      # (n, H, W)
    apart = np.abs(turn[..., None] - np.arange(bins))       # (n, H, W, bins)
    votes = np.hypot(dx, dy)[..., None] * np.clip(1 - np.minimum(apart, bins - apart), 0, None)
    n, rows, columns = len(crops), crops.shape[1] // cell, crops.shape[2] // cell
    cells = votes.reshape(n, rows, cell, columns, cell, bins).sum((2, 4), dtype=np.float32)
    blocks = np.concatenate([cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]], -1)
    blocks = normalize(torch.from_numpy(blocks), dim=-1).clamp(max=0.2)
    return normalize(normalize(blocks, dim=-1).flatten(1))


def nearest_scores(likeness, labels, num_ids):
    """The best likeness to each id's images, -inf where there is none: (Q, G), (G,) -> (Q, N)."""
    scores = likeness.new_full((len(likeness), num_ids + 1), -torch.inf)
    return scores.scatter_reduce(1, labels.expand(len(likeness), -1), likeness, 'amax')[:, :num_ids]


def baselines(train_crops, train_labels, test_crops, test_labels, num_ids):
    """Scores without learning: DataFrame, a row a method, columns map5 and named_top1 (new_whale images left out).

    Crops are (n, H, W) grey; labels (n,) int64 are 0..N-1, N for new_whale.
    """
    frequency = torch.bincount(train_labels, minlength=num_ids + 1)
    common = frequency[:num_ids].float().expand(len(test_labels), -1)
    methods = {'new_whale, then the most frequent ids': (common, torch.inf)}
    asks = (train_labels == num_ids) | (frequency[train_labels] > 1)    # an id's only image has nothing to find
    for name, features in [('nearest neighbour, pixels', pixel_features), ('nearest neighbour, HOG', hog_features)]:
        train, test = features(train_crops), features(test_crops)
        others = nearest_scores((train @ train.T).fill_diagonal_(-torch.inf), train_labels, num_ids)
        threshold, _ = choose_threshold(others[asks], train_labels[asks])
        methods[name] = nearest_scores(test @ train.T, train_labels, num_ids), threshold
    named = test_labels < num_ids
    return pd.DataFrame.from_dict({name: {
        'map5': map_at_5(rank_of_truth(scores, test_labels, threshold)).item(),
        'named_top1': (scores.argmax(1) == test_labels)[named].float().mean().item(),
    } for name, (scores, threshold) in methods.items()}, orient='index')


def baselines_of(data_dir):
    """`baselines` of a folder in Kaggle's layout; UserError unless its test_labels.csv names every test image."""
    tables = load_tables(data_dir)
    number = {name: label for label, name in enumerate([*tables.ids, NEW_WHALE])}
    truth = read_labels(Path(data_dir) / 'test_labels.csv').set_index('Image')['Id'].map(number)
    test_labels = tables.test['Image'].map(truth)
    if not len(test_labels) or test_labels.isna().any():
        raise UserError(f'{data_dir}/test_labels.csv must give each test image an id of train.csv or {NEW_WHALE}')
    train_labels = tables.train['label'].clip(upper=tables.num_ids)
    labels = (torch.tensor(column.to_numpy(int)) for column in (train_labels, test_labels))
    return baselines(grey_crops(tables.train), next(labels), grey_crops(tables.test), next(labels), tables.num_ids)


@exit_clearly
def main(argv):
    if len(argv) != 1:
        raise UserError('give one folder: python -m utils.baselines data/sample')
    print(baselines_of(argv[0]).rename(columns={'map5': 'MAP@5', 'named_top1': 'named-only top-1'}).round(3))


if __name__ == '__main__':
    main(sys.argv[1:])
