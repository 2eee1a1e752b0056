"""Go on, or a next step? What the folder of a run and the constants together ask for.

When `freeze`, `min_num_class`, `lr` and `checkPoint_start` (with `stages = 'all'`: the rows of the schedule) are those
of last.pth, its step goes on where it stopped. When one differs, a new step begins: weights from `checkPoint_start`, a
new optimizer, counters at zero.
"""
import numpy as np

from utils import checkpoint
from utils.errors import UserError

STEP = ('freeze', 'min_num_class', 'lr', 'checkPoint_start')
FIXED = ('model_name', 'height', 'width', 'flip_is_new_id', 'fold', 'seed', 'pretrained', 'strips',
         'w_local')  # of a run, over all its steps


def plan(c, folder):
    """The steps to train, as dicts, and the state of the first: that of last.pth when it goes on, else a fresh one.

    No steps: the training is finished, which is said. Raises UserError when the folder holds another training.
    """
    if c.stages != 'all':
        rows, shares = [(0, False, c.lr) if c.stages == 'cosine' else (c.min_num_class, c.freeze, c.lr)], [1.0]
    else:
        rows, shares = (c.schedule if c.pretrained else c.schedule_scratch), c.stage_share
        if len(shares) != len(rows):
            raise UserError(f'stage_share has {len(shares)} numbers for {len(rows)} stages; give one for each')
    rows = [tuple(row) for row in rows]  # brackets mean the same on the command line
    last = checkpoint.load(folder / 'last.pth') if (folder / 'last.pth').exists() else None
    same = last and last['constants']['stages'] == c.stages and (
        [tuple(row) for row in last['rows']] == rows and last['start'] == c.checkPoint_start)
    first = last['first'] if same else (last['step'] + 1 if last else 1)
    done = np.cumsum(shares) / sum(shares)
    # A stage that the clock ends has not converged: its best evaluation so far is mostly luck, its last one the furthest.
    between = 'last' if c.max_minutes else 'best'
    steps = [dict(step=first + i, first=first, rows=rows, start=c.checkPoint_start, share=float(done[i]),
                  min_num_class=row[0], freeze=row[1], lr=row[2], last=i == len(rows) - 1,
                  checkPoint_start=c.checkPoint_start if i == 0 else between) for i, row in enumerate(rows)]
    if last:
        for name in FIXED:
            was, now = last['constants'][name], getattr(c, name)
            if bool(was) != bool(now) if name.startswith('w_') else was != now:  # of a loss: whether its layers are trained
                raise UserError(f'{folder} was trained with {name} = {was!r}, not '
                                f'{now!r}; set it back, or choose another run')
    if not same:
        if c.checkPoint_start:
            checkpoint.find(folder, c.checkPoint_start, before_step=first)
        return steps, fresh(last, steps[0], 0.0)
    steps = [step for step in steps if step['step'] > last['step'] or step['step'] == last['step'] and not last['finished']]
    if not steps:
        print(f'{folder}: this training is finished (best validation MAP@5 {last["best"]:.3f}). For the next step change '
              f'{", ".join(STEP)}; for another training set run.')
    return steps, last


def fresh(previous, step, elapsed):
    """The state of a step that has not begun."""
    return dict(step=step['step'], iteration=0, model=None, optimizer=None, finished=False, best=0.0,
                since_best=0, kept=[], threshold=0.5, sums=None, fold_images=previous['fold_images'] if previous else None,
                elapsed=elapsed, mark=elapsed, log=previous['log'] if previous else [],
                evaluations=previous['evaluations'] if previous else [])
