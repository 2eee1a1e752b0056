"""What each part of the method is worth: `python -m benchmarks.ablation DATA ... [--seeds 3] [--part 0/2]`.

Trains every row of ROWS on each data folder (with a test_labels.csv, read only to score the finished answers), with equal
numbers of images seen and the same small network, and appends a line a run to benchmarks/ablation.csv. Runs that stand
there are skipped, so it can be stopped, spread over days, or run as one process a core, each with its --part. Prints the
table. Without arguments it only prints. Rows of parts that lost and are gone (ArcFace, averaged weights, P x 4 images,
GeM) stand in the table alone.
"""
import argparse
import contextlib
import io
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

import test as answer
import train
from data.sampler import BatchSampler
from utils.metrics import score_submission

CSV = Path(__file__).with_suffix('.csv')
IMAGES = 36_000  # seen by each row
STAGES = (0.5, 0.3, 0.2)  # of the iterations
NETWORK = dict(model_name='seresnext14', height=64, width=64, pretrained=False, batch_size=48, patience=10 ** 6)

PUBLISHED = dict(strips='down', steps=[(10, False, 3e-4), (0, True, 3e-4), (0, True, 3e-5)], strength_scratch=(1.0, 1.0))
FULL = (1.0, 1.0)
COSINE = dict(strips='down', stages='cosine', lr=2e-3, steps=[None])
OURS = dict(strips='down', steps=[(0, False, 1e-3), (0, False, 3e-4), (0, False, 1e-4)])


def without_new_whale(self, labels, batch_size, new_whale, *more, real=BatchSampler.__init__):
    real(self, np.where(labels == new_whale, -1, labels), batch_size, new_whale, *more)


def flip_each(self, iteration, real=BatchSampler.batch):
    pairs = real(self, iteration)
    pairs[:, 1] = np.random.default_rng((self.seed, 2, iteration)).integers(2, size=len(pairs))
    return pairs


ROWS = {  # name -> constants, and what is patched
    'the reference': (PUBLISHED, {}),
    '- flipped ids': (dict(PUBLISHED, flip_is_new_id=False), {}),
    '- new_whale images': (PUBLISHED, {'__init__': without_new_whale}),
    '- triplets, global and local': (dict(PUBLISHED, w_triplet=0.0, w_local=0.0), {}),
    '- local triplets': (dict(PUBLISHED, w_local=0.0), {}),
    '- hard example mining': (dict(PUBLISHED, hardest=10 ** 6), {}),
    '- stages (all ids at 3e-4)': (dict(PUBLISHED, steps=[(0, False, 3e-4)]), {}),
    '- flips drawn for the pair': (PUBLISHED, {'batch': flip_each}),
    'ours (see schedule_scratch, strength_scratch)': (OURS, {}),
    '+ augmentation at full strength': (dict(OURS, strength_scratch=FULL), {}),
    '+ strips across': (dict(OURS, strips='across'), {}),
    '+ AdamW, cosine, one run': (COSINE, {}),
    '+ timm/resnet18 in place of SE-ResNeXt': (dict(OURS, model_name='timm/resnet18'), {}),
    'strips across, no local triplets': (dict(OURS, strips='across', w_local=0.0), {}),
    'strips across, full strength': (dict(OURS, strips='across', strength_scratch=FULL), {}),
    'strips across, AdamW, cosine': (dict(COSINE, strips='across'), {}),
}


def train_steps(steps, **constants):
    """Train the (min_num_class, freeze, lr) of `steps`, each for its share of IMAGES; None: what the constants say."""
    constants = {**NETWORK, **constants}
    iterations = IMAGES // constants['batch_size']
    for number, (step, share) in enumerate(zip(steps, STAGES if len(steps) > 1 else [1.0])):
        own = dict(zip(('min_num_class', 'freeze', 'lr'), step or ()))
        call(train, **{**constants, 'max_iters': round(share * iterations), 'eval_every': iterations // 3,
                       'checkPoint_start': 'last' if number else 0, **own})


def run_one(data_dir, name, seed, threads):
    """Train and answer once; the line of the table."""
    constants, patches = ROWS[name]
    shared = dict(data_dir=data_dir, run=f'ablation/{os.getpid()}', threads=threads)
    folder, began = Path('results') / shared['run'], time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for method, patched in patches.items():
            stack.enter_context(mock.patch.object(BatchSampler, method, patched))
        train_steps(**shared, seed=seed, **constants)
        seconds = time.monotonic() - began
        valid = pd.read_csv(folder / 'evaluations.csv')['valid_map5'].iloc[-1]
        classifiers, scores = (answer_and_score(**shared, gallery_weight=weight) for weight in (0.0, -1.0))
    shutil.rmtree(folder)
    return dict(data=Path(data_dir).name, row=name, seed=seed, images=IMAGES, seconds=round(seconds),
                valid_map5=round(valid, 4), test_map5=round(scores['map5'], 4), named_top1=round(scores['named_top1'], 4),
                classifiers_map5=round(classifiers['map5'], 4))


def answer_and_score(data_dir, run, **settings):
    call(answer, data_dir=data_dir, run=run, checkPoint_start='last', matches=0, **settings)
    return score_submission(Path('results') / run / 'submission.csv', Path(data_dir) / 'test_labels.csv')


def call(script, **constants):
    script.main([part for name, value in constants.items() for part in (f'--{name}', str(value))])


def show(table):
    """Mean and spread over the seeds, a column for each data set and figure."""
    def cell(values):
        values = values.dropna()
        return '' if values.empty else f'{values.mean():.3f}' + (f' ± {values.std():.3f}' if len(values) > 1 else '')

    for data, rows in table.groupby('data', sort=False):
        print(f'\n| {data} | validation MAP@5 | test MAP@5 | classifiers alone | named top-1 | seconds | seeds |\n'
              '|---|---|---|---|---|---|---|')
        few = []
        for name in dict.fromkeys([*ROWS, *rows['row']]):  # those that are no longer there too
            runs = rows[rows['row'] == name]
            cells = [cell(runs[column]) for column in ('valid_map5', 'test_map5', 'classifiers_map5', 'named_top1')]
            if len(runs) > 2:
                print(f'| {name} | {" | ".join(cells)} | {runs["seconds"].mean():.0f} | {len(runs)} |')
            elif len(runs):
                few.append(f'{name} {cells[1]} ({len(runs)})')
        print('\nTest MAP@5 (seeds) of others: ' + '; '.join(few))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='*', help='folders in the layout of the competition, with test_labels.csv')
    parser.add_argument('--rows', default='', help='only rows whose names begin with this')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--part', default='0/1', help='0/2 and 1/2: two processes share the work')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of each process')
    options = parser.parse_args()
    part, parts = map(int, options.part.split('/'))
    jobs = [(data, name, seed) for seed in range(options.seeds) for data in options.data
            for name in ROWS if name.startswith(options.rows)]
    for data, name, seed in jobs[part::parts]:
        done = pd.read_csv(CSV) if CSV.exists() else pd.DataFrame(columns=['data', 'row', 'seed'])
        if not ((done['data'] == Path(data).name) & (done['row'] == name) & (done['seed'] == seed)).any():
            line = pd.DataFrame([run_one(data, name, seed, options.threads)])
            with open(CSV, 'a') as file:  # a line at once, so that two processes do not mix
                file.write(line.to_csv(index=False, header=file.tell() == 0))
            print(line.to_string(index=False, header=False), flush=True)
    if CSV.exists():
        show(pd.read_csv(CSV))


if __name__ == '__main__':
    main()
