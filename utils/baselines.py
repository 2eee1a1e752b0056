"""What doing no learning scores: `python -m utils.baselines DATA_DIR`, with the truth in DATA_DIR/test_labels.csv.

Each test image gets the id of its most similar training image, by pixels or by histograms of oriented gradients (HOG,
Dalal and Triggs 2005), on the box crops that the network sees. Thresholds come from the training labels alone.
"""
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from data.decode import read_image
from data.images import cut_crop, raw_size
from data.tables import load_tables, read_labels
from utils.errors import UserError, exit_clearly
from utils.metrics import NEW_WHALE, choose_threshold, map_at_5, rank_of_truth

height, width = 64, 128     # of the grey crops
pixel_height, pixel_width = 32, 64
cell, bins = 8, 9           # HOG: pixels on a cell's side, directions in half a turn


def grey_crops(frame):
    """The boxes of a table's images: (n, height, width) float32 grey, 0..255."""
    raw_height, raw_width = raw_size(height, width)
    y, x = (raw_height - height) // 2, (raw_width - width) // 2     # the surroundings that cut_crop adds
    crops = np.zeros((len(frame), height, width), np.float32)
    boxes = frame[['x0', 'y0', 'x1', 'y1']].to_numpy(float)
    for row, path in enumerate(tqdm(frame['path'], 'crops', unit='img', disable=None)):
        image = read_image(path)
        crop, _ = cut_crop(image, np.zeros(image.shape[:2], np.uint8), boxes[row], raw_height, raw_width)
        crops[row] = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[y:y + height, x:x + width]
    return crops


def pixel_features(crops):
    """Small grey images, mean 0 and length 1: (n, H, W) -> (n, pixel_height * pixel_width)."""
    small = [cv2.resize(crop, (pixel_width, pixel_height), interpolation=cv2.INTER_AREA).ravel() for crop in crops]
    small = torch.from_numpy(np.stack(small))
    return torch.nn.functional.normalize(small - small.mean(1, keepdim=True))


def hog_features(crops):
    """Histograms of oriented gradients, length 1: (n, H, W), sides a multiple of `cell`, -> (n, blocks * 4 * bins)."""
    dy, dx = np.gradient(crops, axis=(1, 2))
    strength, turn = np.hypot(dx, dy), (np.arctan2(dy, dx) % np.pi) / np.pi * bins    # (n, H, W)
    distance = np.abs(turn[..., None] - np.arange(bins))                            # (n, H, W, bins)
    votes = strength[..., None] * np.clip(1 - np.minimum(distance, bins - distance), 0, None)
    n, rows, columns = len(crops), crops.shape[1] // cell, crops.shape[2] // cell
    cells = votes.reshape(n, rows, cell, columns, cell, bins).sum((2, 4), dtype=np.float32)
    blocks = np.concatenate([cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]], -1)
    blocks = torch.nn.functional.normalize(torch.from_numpy(blocks), dim=-1).clamp(max=0.2)
    return torch.nn.functional.normalize(torch.nn.functional.normalize(blocks, dim=-1).flatten(1))


def nearest_scores(likeness, labels, num_ids):
    """The best likeness to each id's images, -inf where there is none: (Q, G), (G,) -> (Q, N)."""
    scores = likeness.new_full((len(likeness), num_ids + 1), -torch.inf)
    return scores.scatter_reduce(1, labels.expand(len(likeness), -1), likeness, 'amax')[:, :num_ids]


def baselines(train_crops, train_labels, test_crops, test_labels, num_ids):
    """Scores without learning: DataFrame, a row a method, columns map5 and named_top1.

    Crops are (n, H, W) grey; labels (n,) int64 are 0..N-1, N for new_whale.
    """
    frequency = torch.bincount(train_labels, minlength=num_ids + 1)
    named = test_labels < num_ids
    table = {}

    def score(name, scores, threshold):
        ranks = rank_of_truth(scores, test_labels, threshold)
        right = scores.argmax(1)[named] == test_labels[named]
        table[name] = {'map5': map_at_5(ranks).item(), 'named_top1': right.float().mean().item()}

    score('new_whale first, then the most frequent ids', frequency[:num_ids].float().expand(len(test_labels), -1), torch.inf)
    asks = (train_labels == num_ids) | (frequency[train_labels] > 1)    # an id's only image has nothing to find
    for name, features in [('nearest neighbour, pixels', pixel_features), ('nearest neighbour, HOG', hog_features)]:
        train, test = features(train_crops), features(test_crops)
        others = (train @ train.T).fill_diagonal_(-torch.inf)
        threshold, _ = choose_threshold(nearest_scores(others, train_labels, num_ids)[asks], train_labels[asks])
        score(name, nearest_scores(test @ train.T, train_labels, num_ids), threshold)
    return pd.DataFrame.from_dict(table, orient='index')


def baselines_of(data_dir):
    """`baselines` of a folder in Kaggle's layout with test_labels.csv; UserError when that is missing or does not fit."""
    tables = load_tables(data_dir)
    truth = read_labels(Path(data_dir) / 'test_labels.csv').set_index('Image')['Id']
    number = {name: label for label, name in enumerate([*tables.ids, NEW_WHALE])}
    test_labels = tables.test['Image'].map(truth).map(number)
    if not len(test_labels) or test_labels.isna().any():
        raise UserError(f'{data_dir}/test_labels.csv does not name every test image by an id of train.csv or new_whale')
    train_labels = torch.from_numpy(tables.train['label'].to_numpy()).clamp(max=tables.num_ids)
    return baselines(grey_crops(tables.train), train_labels, grey_crops(tables.test),
                     torch.from_numpy(test_labels.to_numpy().astype(int)), tables.num_ids)


@exit_clearly
def main(argv):
    if len(argv) != 1:
        raise UserError('give one folder: python -m utils.baselines data/sample')
    print(baselines_of(argv[0]).rename(columns={'map5': 'MAP@5', 'named_top1': 'named-only top-1'}).round(3).to_string())


if __name__ == '__main__':
    main(sys.argv[1:])
