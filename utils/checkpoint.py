"""One file a checkpoint, written whole; which ones a run keeps; where a training starts or goes on."""
import math
import os
import shutil
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError, raise_if_machines
from utils.files import write_whole

ADDED = dict(strips='down')  # constants that older checkpoints lack
# What a checkpoint holds, by type; a list is a list of such.
CONTENT = dict(
    model=dict, optimizer=dict(state=dict, param_groups=[dict]), sums=torch.Tensor, ids=[str],
    fold_images=[str], iteration=int, step=int, first=int, finished=bool, best=float, since_best=int, kept=[tuple],
    threshold=float, rows=[tuple], start=(int, str), elapsed=float, mark=float, log=[str], evaluations=[dict], constants=dict(
        model_name=str, height=int, width=int, flip_is_new_id=bool, fold=int, seed=int, pretrained=bool, stages=str,
        strips=str, w_local=float))
KEEP = 3  # the best evaluations of a step also stay under their iteration


def save(path, state):
    """Write a checkpoint whole or not at all. `state` holds tensors and plain Python values only."""
    write_whole(path, lambda temporary: torch.save(state, temporary))


def require_stored(path):
    """ValueError (or zipfile's own) unless each part of a zip lies in it as it was written: compressed it may claim any size."""
    with zipfile.ZipFile(path) as file:
        parts, size = file.infolist(), os.path.getsize(path)
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size or file.testzip():
            raise ValueError('it is compressed, or damaged')


def read(path):
    """What torch.save wrote, as long as it is tensors and plain values; anything else raises one of many kinds of errors."""
    require_stored(path)
    return torch.load(path, map_location='cpu', weights_only=True)


def _is(found, kind):
    """Whether a value is of a type, or a list or dict as `kind` draws it; no count is negative or huge, no number infinite."""
    if isinstance(kind, dict):
        return isinstance(found, dict) and all(_is(found.get(name), inner) for name, inner in kind.items())
    if isinstance(kind, list):
        return isinstance(found, list) and all(_is(one, kind[0]) for one in found)
    if isinstance(found, int) and not 0 <= found < 10 ** 9 or isinstance(found, float) and not math.isfinite(found):
        return False
    return isinstance(found, kind)


def load(path):
    """Read a checkpoint; only tensors and plain values are accepted, no code. Raises UserError for anything else."""
    try:
        state = read(path)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint; all mean the same here
        raise_if_machines(error)
        raise UserError(f'{path} is not a readable checkpoint ({type(error).__name__}); '
                        'delete it or name another with checkPoint_start') from error
    if _is(state, dict(constants=dict)):
        state = {**state, 'constants': {**ADDED, **state['constants']}}
        sums = state.get('sums')
        if isinstance(sums, torch.Tensor) and sums.shape == (10,) and not state.get('raw'):  # the sixth was of ArcFace
            state['sums'] = torch.cat([sums[:5], sums[6:]])
    if not _is(state, CONTENT) or not all(32 <= state['constants'][side] <= 10_000 for side in ('height', 'width')) or \
            not all(len(pair) == 2 and _is(pair[0], float) and _is(pair[1], int) for pair in state['kept']):
        raise UserError(f'{path} is no checkpoint of train.py; name another with checkPoint_start')
    return state


def fill(net, state, path):
    """Load a checkpoint's weights into the network; UserError when they are those of another network."""
    try:
        net.load_state_dict(state['model'])
    except Exception as error:  # RuntimeError, and others where the dict holds no tensors
        made = ', '.join(f'{name} = {state["constants"].get(name)!r}' for name in (
            'model_name', 'flip_is_new_id'))
        raise UserError(f'the weights in {path} do not fit: it was trained with {made}; set the same, or name another '
                        'checkpoint') from error


def fill_optimizer(optimizer, sums, state, path):
    """Go on with a checkpoint's moments, and its `sums` of what was measured, in place. UserError when they do not fit.

    Each moment must lie in memory as its weight does, which torch's fused kernels do not check.
    """
    try:
        optimizer.load_state_dict(state['optimizer'])
        sums += state['sums'].to(sums.device)
        fits = all(own['step'].dim() == 0 and own[name].shape == weight.shape and own[name].stride() == weight.stride()
                   for weight, own in optimizer.state.items() for name in ('exp_avg', 'exp_avg_sq'))
        fits = fits and all(isinstance(group['lr'], float) and len(group['betas']) == 2 for group in optimizer.param_groups)
    except Exception as error:  # torch raises many kinds
        raise_if_machines(error)
        fits = False
    if not fits:
        raise UserError(f'the optimizer in {path} is not that of its weights: start from them, with checkPoint_start')


def find(folder, start, before_step=None):
    """The file that a `checkPoint_start` names: 'best', 'last', an iteration, or a path.

    Inside a training, 'best' is the best of the step before `before_step`; for test.py, of the latest step.
    """
    if start == 'best' and before_step is not None:
        earlier = [folder / f'step{step}_best.pth' for step in range(before_step - 1, 0, -1)]
        path = next((file for file in earlier if file.exists()), folder / 'best.pth')
    elif start in ('best', 'last'):
        path = folder / f'{start}.pth'
    elif isinstance(start, int):
        found = list(folder.glob(f'step*_{start:06d}.pth'))
        kept = ', '.join(sorted(file.stem for file in folder.glob('step*_[0-9]*.pth'))) or 'none'
        if not found:
            raise UserError(f'{folder} keeps no checkpoint of iteration {start} (there are: {kept}); '
                            "name one of them, 'best' or 'last'")
        path = max(found, key=lambda file: int(file.stem[4:].split('_')[0]))  # of the latest step
    else:
        path = Path(start)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path} (checkPoint_start = {start!r}); "
                        'train the step before first, or name another')
    return path


def keep_best(folder, state, map5):
    """Save `state` as its step's best if it is, and under its iteration if it is one of the KEEP best.

    Its `kept` is the list of (MAP@5, iteration) under their own names. Returns the new list, which a saved state has, and the
    file that holds it, or None. Equal scores: the later wins.
    """
    def file(iteration):
        return folder / f'step{state["step"]}_{iteration:06d}.pth'

    now = map5, state['iteration']
    ranked = sorted([*state['kept'], now], reverse=True)[:KEEP]
    if now not in ranked:
        return ranked, None
    own = file(state['iteration'])
    save(own, {**state, 'kept': ranked})
    if ranked[0] == now:
        for name in (f'step{state["step"]}_best.pth', 'best.pth'):
            link(own, folder / name)
    for score, old in state['kept']:
        if (score, old) not in ranked:
            file(old).unlink(missing_ok=True)
    return ranked, own


def link(own, path):
    """A second name for one checkpoint, which costs neither disk space nor time; a copy where links are refused."""
    def write(temporary):
        os.unlink(temporary)
        try:
            os.link(own, temporary)
        except OSError:
            shutil.copyfile(own, temporary)

    write_whole(path, write)
