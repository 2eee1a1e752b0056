"""How well animals are named that were enrolled, not trained: `python -m benchmarks.enrolment DATA`.

30% of the ids are taken out of training, then enrolled from their training photographs. Prints the top-1 of test
photographs of enrolled and of trained ids, at the first label that is not new_whale; and, for comparison, what a training
of all ids reaches on the same two groups. test_labels.csv is read for that alone.
"""
import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import test as answer
from benchmarks.ablation import OURS, call, train_steps

HELD_OUT = 0.3


def train_and_answer(data_dir, run, options, enrol=None):
    """The first named label of each test image: a Series by image."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_steps(**OURS, data_dir=data_dir, run=run, threads=options.threads)
        settings = dict(data_dir=data_dir, run=run, checkPoint_start='last', threads=options.threads, matches=0)
        if enrol:
            call(answer, enrol=enrol, **settings)
        call(answer, **settings)
    print('\n'.join(line for line in said.getvalue().splitlines() if 'validation MAP' in line or 'enrolled' in line))
    labels = pd.read_csv(Path('results') / run / 'submission.csv').set_index('Image')['Id'].str.split()
    return labels.map(lambda row: next(label for label in row if label != 'new_whale'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--threads', type=int, default=0)
    options = parser.parse_args()
    data = Path(options.data).resolve()
    table = pd.read_csv(data / 'train.csv')
    ids = sorted(set(table['Id']) - {'new_whale'})
    held = set(np.random.default_rng(0).choice(ids, round(HELD_OUT * len(ids)), replace=False))
    with tempfile.TemporaryDirectory() as folder:
        part, new = Path(folder) / 'part', Path(folder) / 'new'
        part.mkdir(), new.mkdir()
        for name in ('train', 'test', 'sample_submission.csv'):
            os.symlink(data / name, part / name)
        table[~table['Id'].isin(held)].to_csv(part / 'train.csv', index=False)
        enrolled = table[table['Id'].isin(held)]
        for image in enrolled['Image']:
            os.symlink(data / 'train' / image, new / image)
        enrolled.to_csv(new / 'new.csv', index=False)
        answers = {'some enrolled': train_and_answer(part, f'enrolment/{os.getpid()}', options, new / 'new.csv'),
                   'all trained': train_and_answer(data, f'enrolment/{os.getpid()}all', options)}
    truth = pd.read_csv(data / 'test_labels.csv').set_index('Image')['Id']
    single = truth.map(table['Id'].value_counts()) == 1
    groups = {'the other ids': truth.isin(set(ids) - held), f'{len(held)} ids held out of training': truth.isin(held),
              'of these, with one photograph': truth.isin(held) & single}
    print(pd.DataFrame({'test photographs': {name: rows.sum() for name, rows in groups.items()},
                        **{what: {name: (given[truth.index] == truth)[rows].mean() for name, rows in groups.items()}
                           for what, given in answers.items()}}).round(3).to_string())


if __name__ == '__main__':
    main()
