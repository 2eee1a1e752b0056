"""What an ensemble and pseudo-labels add: `python -m benchmarks.distillation DATA`.

Trains the ablation's network with three seeds, takes their mean, writes pseudo-labels from it, and trains again with them for
as many images. Prints how each answers the test photographs, and how many pseudo-labels are right; test_labels.csv is read for
that alone. Trainings that are in results/distillation/DATA are not repeated.
"""
import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path

import pandas as pd

import test as answer
from benchmarks.ablation import OURS, call, train_steps
from utils.metrics import score_submission

SEEDS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--threads', type=int, default=0)
    parser.add_argument('--least', type=float, default=0.5, help='score of a pseudo-label (so short a training is never sure)')
    parser.add_argument('--most', type=float, default=0.22, help='score of the best id of what becomes new_whale')
    options = parser.parse_args()
    data, results = Path(options.data).resolve(), Path('results')
    runs = [f'distillation/{data.name}/{name}' for name in [*range(SEEDS), 'distilled']]
    truth = pd.read_csv(data / 'test_labels.csv').set_index('Image')['Id']
    rows = {}

    def score(name, folder):
        rows[name] = score_submission(results / folder / 'submission.csv', data / 'test_labels.csv')
        print(name, rows[name], flush=True)

    with tempfile.TemporaryDirectory() as own:  # where pseudo_labels.csv may be written
        for name in ('train', 'test', 'train.csv', 'sample_submission.csv'):
            os.symlink(data / name, Path(own) / name)
        shared = dict(data_dir=own, threads=options.threads)
        for seed, run in enumerate(runs):
            distilled = seed == SEEDS
            settings = dict(seed=0, pseudo_label_weight=0.5) if distilled else dict(seed=seed)
            with contextlib.redirect_stdout(io.StringIO()):
                if not (results / run / 'scores.npz').exists():
                    train_steps(**OURS, **shared, **settings, run=run)
                call(answer, **shared, run=run, checkPoint_start='last', matches=0)
            score('with pseudo-labels, seed 0' if distilled else f'seed {seed}', run)
            if seed == SEEDS - 1:
                members = ','.join(str(results / run / 'scores.npz') for run in runs[:SEEDS])
                call(answer, **shared, run=members, pseudo_label_min_score=options.least, pseudo_new_max_score=options.most)
                score('mean of the three', 'ensemble')
                labels = pd.read_csv(Path(own) / 'pseudo_labels.csv').set_index('Image')['Id']
                named = labels != 'new_whale'
                right = labels == truth[labels.index]
                print(f'pseudo-labels: {named.sum()} of ids, {right[named].mean():.3f} of them right; {(~named).sum()} of '
                      f'new_whale, {right[~named].mean():.3f} right; of {len(truth)} test photographs')
    print(pd.DataFrame(rows).T[['map5', 'named_top1']].round(3).to_string())


if __name__ == '__main__':
    main()
