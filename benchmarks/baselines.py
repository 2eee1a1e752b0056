"""What doing no learning scores, by DATA_DIR/test_labels.csv: `python -m benchmarks.baselines DATA_DIR [--run RUN]`.

Each test image gets the ids of its most similar training images, by pixels or by histograms of oriented
gradients (HOG, Dalal and Triggs 2005), on the network's box crops; thresholds come from the training labels.
"""
import argparse
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from data.decode import read_image
from data.images import Crops, cut_crop, raw_size
from data.tables import load_tables, read_labels
from models.whale_net import whale_net
from utils import checkpoint
from utils.errors import UserError, exit_clearly
from utils.files import write_whole
from utils.metrics import NEW_WHALE, choose_threshold, map_at_5, rank_of_truth, score_submission
from utils.scores import predict

height, width = 64, 128     # of the grey crops; half of that for pixels
cell, bins = 8, 9           # HOG: pixels on a cell's side, directions in half a turn


def grey_crops(frame):
    """The boxes of a table's images: (n, height, width) float32 grey, 0..255."""
    size = raw_size(height, width)
    y, x = (size[0] - height) // 2, (size[1] - width) // 2      # the surroundings that cut_crop adds
    crops = np.zeros((len(frame), height, width), np.float32)
    for row, (path, *box) in enumerate(frame[['path', 'x0', 'y0', 'x1', 'y1']].itertuples(index=False)):
        image = read_image(path)
        crop, _ = cut_crop(image, None, np.array(box, float), *size)
        crops[row] = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[y:y + height, x:x + width]
    return crops


def pixel_features(crops):
    """Grey images of half the size, mean 0 and length 1: (n, H, W) -> (n, H * W / 4)."""
    small = torch.nn.functional.avg_pool2d(torch.from_numpy(crops)[:, None], 2).flatten(1)
    return normalize(small - small.mean(1, keepdim=True))


def hog_features(crops):
    """Histograms of oriented gradients, length 1: (n, H, W), multiples of `cell` -> (n, blocks * 36)."""
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


def score(scores, truth, threshold):
    """MAP@5, and top-1 of the named images when new_whale may not be said: dict map5, named_top1."""
    named = truth < scores.shape[1]
    return {'map5': map_at_5(rank_of_truth(scores, truth, threshold)).item(),
            'named_top1': (scores.argmax(1) == truth)[named].float().mean().item()}


def nearest(train, train_labels, test, test_labels, num_ids):
    """`score` of the nearest neighbour by (n, C) features of length 1; threshold by leaving one out."""
    repeated = torch.bincount(train_labels)[train_labels] > 1
    asks = repeated | (train_labels == num_ids)     # an id's only image has nothing to find
    others = nearest_scores((train @ train.T).fill_diagonal_(-torch.inf), train_labels, num_ids)
    threshold, _ = choose_threshold(others[asks], train_labels[asks])
    return score(nearest_scores(test @ train.T, train_labels, num_ids), test_labels, threshold)


def baselines(train_crops, train_labels, test_crops, test_labels, num_ids):
    """Scores without learning: DataFrame, a row a method, columns map5 and named_top1.

    Crops are (n, H, W) grey; labels (n,) int64 are 0..N-1, N for new_whale.
    """
    common = torch.bincount(train_labels, minlength=num_ids + 1)[:num_ids].expand(len(test_labels), -1)
    table = {'new_whale, then the most frequent ids': score(common.float(), test_labels, torch.inf)}
    for kind, features in [('pixels', pixel_features), ('HOG', hog_features)]:
        table[f'nearest neighbour, {kind}'] = nearest(
            features(train_crops), train_labels, features(test_crops), test_labels, num_ids)
    return pd.DataFrame.from_dict(table, orient='index')


def untrained(tables, train_labels, test_labels, run):
    """`nearest` by the embedding of the network of results/RUN as it was before training."""
    c = checkpoint.load(checkpoint.find(Path('results') / run, 'best'))['constants']
    torch.manual_seed(c['seed'])
    net = whale_net(c, 2 * tables.num_ids)
    features = []
    for frame in (tables.train, tables.test):
        crops = Crops(frame, c['height'], c['width'], c['cache_dir'])
        _, embedding = predict(net, crops, np.arange(len(frame)), c['height'], c['width'], tables.num_ids)
        features.append(embedding.flatten(1) / 2 ** 0.5)     # (n, 2C): the image and its mirror image
    return nearest(features[0], train_labels, features[1], test_labels, tables.num_ids)


def baselines_of(data_dir, run=None):
    """`baselines` of a folder in Kaggle's layout; with `run` also that network untrained, and its submission.

    Raises UserError unless test_labels.csv gives every test image an id of train.csv or new_whale.
    """
    tables, labels_csv = load_tables(data_dir), Path(data_dir) / 'test_labels.csv'
    number = {name: label for label, name in enumerate([*tables.ids, NEW_WHALE])}
    truth = read_labels(labels_csv).set_index('Image')['Id'].map(number)
    test_labels = tables.test['Image'].map(truth)
    if not len(test_labels) or test_labels.isna().any():
        raise UserError(f'{labels_csv} must give each test image an id of train.csv, or new_whale')
    train_labels = torch.tensor(tables.train['label'].to_numpy()).clamp(max=tables.num_ids)
    test_labels = torch.tensor(test_labels.to_numpy(int))
    crops = (grey_crops(frame) for frame in (tables.train, tables.test))
    table = baselines(next(crops), train_labels, next(crops), test_labels, tables.num_ids)
    if run:
        table.loc['nearest neighbour, untrained network'] = untrained(tables, train_labels, test_labels, run)
        result = score_submission(Path('results') / run / 'submission.csv', labels_csv)
        table.loc['trained network'] = {name: result[name] for name in table.columns}
    return table


@exit_clearly
def main():
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description='What doing no learning scores on a data set.')
    parser.add_argument('data_dir', help='folder in Kaggle\'s layout, with test_labels.csv')
    parser.add_argument('--run', help='also this training and its network untrained; writes results/RUN/score.csv')
    options = parser.parse_args()
    table = baselines_of(options.data_dir, options.run)
    if options.run:
        write_whole(Path('results') / options.run / 'score.csv', lambda path: table.to_csv(path, index_label='method'))
    print(table.rename(columns={'map5': 'MAP@5', 'named_top1': 'named-only top-1'}).round(3).to_string())


if __name__ == '__main__':
    main()
