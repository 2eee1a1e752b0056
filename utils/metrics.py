"""MAP@5, the threshold of new_whale, submissions; `python -m utils.metrics submission.csv test_labels.csv`.

Throughout, `scores` (Q, N) holds one score an id, higher is better, ties going to the lower index; `truth`
(Q,) is 0..N-1, or N for new_whale, which stands right above the ids whose score is below `threshold`.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data.tables import NEW_WHALE, read_csv, read_labels
from utils.errors import UserError, exit_clearly
from utils.files import write_whole


def rank_of_truth(scores, truth, threshold):
    """The place of the truth in each row's list, 0 = first: (Q,) int64. Counted, not sorted."""
    n_ids = scores.shape[1]
    column = truth.clamp(max=n_ids - 1)[:, None]
    own = scores.gather(1, column)  # (Q, 1)
    # `not <=` rather than `>`: a score that is not a number ranks first, so it never makes a row look right.
    above = (~(scores <= own)).sum(1)
    equal_before = ((scores == own) & (torch.arange(n_ids, device=scores.device) < column)).sum(1)
    of_id = above + equal_before + (own[:, 0] < threshold)
    return torch.where(truth == n_ids, (scores >= threshold).sum(1), of_id)


def average_precision(ranks):
    """1 / (rank + 1) for the first five places, 0 behind them: what each row gives to MAP@5."""
    return (ranks < 5) / (ranks + 1.0)


def map_at_5(ranks):
    """The mean over the rows, a scalar tensor."""
    return average_precision(ranks).mean()


def top_k(ranks, k):
    """The share of rows with the truth among the first k, a scalar tensor."""
    return (ranks < k).float().mean()


def choose_threshold(scores, truth):
    """The threshold with the best MAP@5 on these rows, and that MAP@5: (float, float).

    As the threshold rises past a score, the id that has it falls by one place, and new_whale rises by one.
    Only five places count, so sorting their scores and adding up the changes gives MAP@5 on every interval.
    The middle of the best interval is returned, of the widest when several are equally good; the open ends
    count as wide as an average one. An id without a score has -inf. UserError when scores are not finite.
    """
    if not scores.numel() or not scores.max() < torch.inf:
        raise UserError('the scores are empty or not finite, so they give no threshold; see the training log')
    values, order = best_ids(scores)  # (Q, K), K = min(5, N)
    hit = order == truth[:, None]
    is_new = (truth == scores.shape[1])[:, None]
    # In sixtieths (60 is divisible by 1..5) sums are exact, and equally good intervals are seen as equal.
    gain = torch.tensor([60, 30, 20, 15, 12, 0], device=scores.device)
    places = values.shape[1]
    change = (is_new.long() - hit.long()) * -gain.diff()[:places]  # (Q, K)
    finite = values > -torch.inf  # a threshold always stands above -inf
    lowest = (hit * gain[:places]).sum() + is_new.sum() * gain[places] + change[~finite].sum()

    at, event = values[finite].unique(return_inverse=True)
    change = torch.zeros_like(at, dtype=torch.int64).index_add_(0, event, change[finite])
    at, change = at[change != 0], change[change != 0]
    map5 = torch.cat([lowest[None], lowest + change.cumsum(0)])  # (intervals,) sixtieths, summed
    margin = (at[-1:] - at[:1]) / len(at) if len(at) > 1 else torch.ones_like(at)
    edges = torch.cat([at[:1] - margin, at, at[-1:] + margin]) if len(at) else values.new_tensor([0, 1])
    best = edges.diff().masked_fill(map5 < map5.max(), -1).argmax()
    low, high = edges[best], edges[best + 1]
    middle = low + (high - low) / 2
    # An interval holds its upper edge, not its lower one; the middle of neighbouring floats may be either.
    threshold = middle if middle > low else high
    return threshold.item(), map5.max().item() / 60 / len(truth)


def best_ids(scores):
    """The five best ids of each row, best first: their scores and indices, (Q, min(5, N)) each."""
    values, order = scores.topk(min(6, scores.shape[1]))
    # topk promises no order among equal scores, and a sixth one may equal the fifth: sort those rows.
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    order[tied] = scores[tied].sort(stable=True, descending=True).indices[:, :order.shape[1]]
    return values[:, :5], order[:, :5]


def insert_new_whale(values, order, num_ids, threshold):
    """The five best answers of each row, from `best_ids`: (Q, min(5, N + 1)) int64, where N is new_whale."""
    place = (values >= threshold).sum(1, keepdim=True)  # (Q, 1) of new_whale
    new = torch.full_like(place, num_ids)
    before, behind = torch.cat([order, new], 1), torch.cat([new, order], 1)
    column = torch.arange(before.shape[1], device=values.device)
    return torch.where(column < place, before, behind).scatter(1, place, new)[:, :5]


def check_submission(frame, sample, name='the submission'):
    """Raise UserError unless `frame` names each image of `sample` once, with 1 to 5 different labels."""
    frame, images, wanted = frame.reset_index(drop=True), frame['Image'], sample['Image']
    labels = frame['Id'].str.split().explode()
    count = labels.notna().groupby(level=0).sum()
    for wrong, problem in (
            (images[images.duplicated()], 'has more than one row for'),
            (images[~images.isin(wanted)], 'has an image that is not asked for:'),
            (wanted[~wanted.isin(images)], 'has no row for'),
            (frame['Image'][count == 0], 'has no label for'),
            (frame['Image'][count > 5], 'has more than 5 labels for'),
            (frame['Image'][labels.groupby(level=0).nunique() < count], 'has the same label twice for')):
        if len(wrong):
            others = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
            raise UserError(f'{name} {problem} {wrong.iloc[0]!r}{others}')


def write_submission(path, images, answers, ids, sample_path):
    """Write Image,Id in the sample submission's order, or raise UserError when something does not fit it.

    `answers` (Q, min(5, N + 1)) index the N `ids`, N being new_whale, as insert_new_whale gives them for `images`.
    """
    sample, wanted = read_csv(sample_path, ['Image']), min(5, len(ids) + 1)
    labels = np.array([*ids, NEW_WHALE])[np.asarray(answers)]
    frame = pd.DataFrame({'Image': list(images), 'Id': [' '.join(row) for row in labels]})
    check_submission(frame, sample)
    if (frame['Id'].str.split().str.len() != wanted).any():
        raise UserError(f'the submission must have {wanted} labels a row, none of them with a space')
    frame = frame.set_index('Image').loc[sample['Image']].reset_index()
    write_whole(path, lambda temporary: frame.to_csv(temporary, index=False))


def score_submission(submission_csv, labels_csv):
    """A dict of map5, top1, named_top1, images, named; UserError when the two files do not fit each other.

    named_top1 looks only at images of known whales, and at the first label that is not new_whale.
    """
    frame, truth = read_csv(submission_csv, ['Image', 'Id'], unique=False), read_labels(labels_csv)
    check_submission(frame, truth, Path(submission_csv).name)
    guesses = frame.set_index('Image').loc[truth['Image'], 'Id']
    guesses = guesses.str.split(expand=True).to_numpy()  # (Q, <= 5)
    answer = truth['Id'].to_numpy()
    right = guesses == answer[:, None]
    ranks = torch.from_numpy(np.where(right.any(1), right.argmax(1), 5))
    named = answer != NEW_WHALE
    first_named = (guesses == NEW_WHALE).argmin(1)  # the first False
    named_right = right[np.arange(len(right)), first_named][named]
    return {'map5': map_at_5(ranks).item(), 'top1': top_k(ranks, 1).item(),
            'named_top1': named_right.mean().item() if named.any() else float('nan'),
            'images': len(answer), 'named': int(named.sum())}


@exit_clearly
def main(argv):
    if len(argv) != 2:
        raise UserError('give two files: python -m utils.metrics submission.csv test_labels.csv')
    print('MAP@5 {map5:.3f}   top-1 {top1:.3f}   named-only top-1 {named_top1:.3f}   '
          '({images} images, {named} named)'.format(**score_submission(*argv)))


if __name__ == '__main__':
    main(sys.argv[1:])
