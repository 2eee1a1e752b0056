"""Train a network that names whales. Edit the constants below, then: python train.py

Each constant can also be given on the command line, e.g. python train.py --run first --lr 1e-4
Results go to results/RUN: log.txt, evaluations.csv, batch.png, curves.png, best.pth, last.pth. Stopped? The same command goes on.
Several GPUs: torchrun --nproc_per_node=8 -- train.py --batch_size 384; each has its share of the batch.
"""
from utils.clock import Clock  # first: max_minutes counts the slow imports too

import gc
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.augment import augment, flip_labels
from data.images import MARGIN
from data.sampler import BatchSampler
from data.tables import NEW_WHALE
from data.training_set import TrainingSet
from models.backbone import build_backbone, check_model_name, freeze_early, load_imagenet, train_mode
from models.whale_net import whale_net
from utils import checkpoint, ranks
from utils.constants import SHARED_RULES, one_of, read_constants, rule
from utils.device import amp_dtype, choose_device, compile_network, describe, require_works
from utils.errors import UserError, exit_clearly, is_out_of_memory
from utils.figures import plot_batch, plot_curves
from utils.files import held, write_whole
from utils.interrupt import Interrupt
from utils.learn import MEASURED, learn, out_of_memory
from utils.log import HEADER, duration, format_row, progress_bar
from utils.metrics import choose_threshold, rank_of_truth, top_k
from utils.scores import predict
from utils.steps import fresh, plan

# The three steps of the method: edit these five, train until it no longer improves, edit, train on. Or stages = 'all'.
model_name = 'senet154'     # senet154, seresnext101, seresnext50, seresnet50/101/152, seresnext26, seresnext14, timm/NAME
freeze = False              # True in steps 2 and 3: train only layer3, layer4 and the heads
min_num_class = 10          # only ids with at least this many images (validation taken out); 0 in steps 2 and 3: all
checkPoint_start = 0        # 0: ImageNet weights; or an iteration, 'best' (of the step before), 'last', a path
lr = 3e-4                   # Adam's step; 3e-5 in step 3
stages = 'one'              # 'one': the step that the constants above describe; 'all': the rows of `schedule` in one go;
                            # 'cosine': all ids in one step by AdamW, lr rising over a twentieth of it, then falling to 0
schedule = [(10, False, 3e-4), (0, True, 3e-4), (0, True, 3e-5)]          # min_num_class, freeze, lr of each stage
schedule_scratch = [(0, False, 1e-3), (0, False, 3e-4), (0, False, 1e-4)]  # with pretrained = False: all ids, no freeze
stage_share = (0.6, 0.25, 0.15)  # of max_minutes, for each stage

# Data
data_dir = 'data'           # where train.csv, train/, test/ lie; data/sample is the drawn one
run = 'whale'               # results go to results/RUN
fold = 0                    # validation split, 0..4
flip_is_new_id = True       # a mirrored fluke is another whale; False for animals whose mirror is the same animal
skip_bad_images = False     # True: go on without images that cannot be read
height = 256                # of the network's input, pixels
width = 512                 # 2:1, as flukes are
cache_dir = 'results/cache'  # decoded crops: 13 GB for the competition's training set at 256x512
cache = 'auto'              # where they are read from: 'device', 'memory', 'disk', 'none' (decode anew), 'auto': what fits
pretrained = True           # ImageNet weights (a file in weights/, else downloaded); False: random weights

pseudo_label_weight = 0.0   # above 0: learn from pseudo_labels.csv too, which test.py writes; 1: as much as from true labels

# Network, loss and batch
strips = 'across'           # of the local branch: 'across' the image, since a fluke is wide, or 'down' it as the reference's
w_sigmoid = 1.0             # weight of the binary classifiers' loss
w_triplet = 1.0             # weight of the triplet loss on the global embedding
w_local = 1.0               # weight of the triplet loss on the aligned strips; 0 leaves the branch out
margin = 0.3                # of both triplet losses
hardest = 30                # classifiers of each image that teach: those most wrong
batch_size = 48             # images: 12 x (anchor, positive, another id, new_whale)
grad_accumulation = 1       # parts a batch is computed in, one after another: less memory, the same gradients but for
                            # batch norm's statistics and triplets, which each part has of its own
strength = (1.0, 1.0)       # of the augmentation, geometric and photometric: 0 none, 1 the reference's ranges
strength_scratch = (0.75, 0.5)  # the same with pretrained = False, where full ranges cost too much time (see the README)
weight_decay = 2e-4         # Adam's L2 (AdamW has 0.05)
clip = 5.0                  # largest gradient norm

# Running
max_iters = 100000          # of each step, at the latest
eval_every = 200            # iterations between evaluations; each also writes last.pth
patience = 20               # a step ends after so many evaluations without a better validation MAP@5
max_minutes = 0.0           # of wall clock for the whole training; 0: no limit
seed = 0                    # same seed, same machine: same weights
device = 'auto'             # 'auto', 'cuda', 'cuda:1', 'cpu'
threads = 0                 # CPU threads; 0: all cores
precision = 'auto'          # 'auto': bf16 where the hardware has it; 'bf16', 'fp32'
compile = 'auto'            # torch.compile: 'auto' on a single GPU; 'yes', 'no'
# ----------------------------------------------------------------------------------------------------------------------

RULES = {
    **SHARED_RULES, **one_of('stages', 'one', 'all', 'cosine'), **one_of('compile', 'auto', 'yes', 'no'),
    **one_of('strips', 'across', 'down'), **rule('model_name', str, bool, 'a text in quotes'),
    **rule('freeze flip_is_new_id pretrained', bool, lambda v: True, 'True or False'),
    **rule('min_num_class', int, lambda v: v >= 0, 'a whole number, 0 or more'),
    **rule('hardest grad_accumulation max_iters eval_every patience', int, lambda v: v > 0, 'a whole number above 0'),
    **rule('w_sigmoid w_triplet w_local margin weight_decay max_minutes pseudo_label_weight', float, lambda v: v >= 0,
           'a number, 0 or more'),
    **rule('lr', float, lambda v: 0 < v < 1, 'a number between 0 and 1'),
    **rule('clip', float, lambda v: v > 0, 'a number above 0'),
    **rule('checkPoint_start', (int, str), lambda v: v != '', "0, an iteration, 'best', 'last' or a path"),
    **rule('schedule schedule_scratch', list, lambda v: v and all(
        len(row) == 3 and isinstance(row[0], int) and isinstance(row[1], bool) and 0 < row[2] < 1 for row in v),
        'a list of (min_num_class, freeze, lr)'),
    **rule('stage_share', tuple, lambda v: all(isinstance(s, (int, float)) and s > 0 for s in v),
           'a positive number for each stage'),
    **rule('strength strength_scratch', tuple, lambda v: len(v) == 2 and all(
        isinstance(s, (int, float)) and 0 <= s <= 2 for s in v), 'two numbers between 0 and 2'),
    **rule('fold', int, lambda v: v in range(5), '0, 1, 2, 3 or 4'),
    **rule('height width', int, lambda v: v >= 32, 'at least 32 pixels'),
    **rule('batch_size', int, lambda v: v >= 8 and v % 4 == 0, 'a multiple of 4, at least 8'),
    **rule('seed', int, lambda v: 0 <= v < 10 ** 6, 'a whole number, 0 to 999999')}
NEVER = 10 ** 9  # later than any iteration


@exit_clearly
def main(argv):
    c = read_constants(globals(), argv, RULES)
    c.model_name = check_model_name(c.model_name)
    unread = {'one': (), 'all': ('min_num_class', 'freeze', 'lr'),
              'cosine': ('min_num_class', 'freeze', 'weight_decay')}[c.stages]
    ignored = [name for name in unread if any(part.split('=')[0] == f'--{name}' for part in argv)]
    if ignored:
        raise UserError(f"--{ignored[0]} has no effect with stages = '{c.stages}'" + (
            ': give it in the rows of schedule (schedule_scratch when pretrained = False)' if c.stages == 'all' else
            ', which trains all ids and layers to the end, by AdamW with 0.05: leave it out'))
    c.device = ranks.start(choose_device(c.device, c.threads))
    require_works(c.device)
    part = c.batch_size // (c.grad_accumulation * ranks.world())
    if part < 8 or part * c.grad_accumulation * ranks.world() != c.batch_size or part % 4:
        raise UserError(f'batch_size = {c.batch_size} cannot be cut into {c.grad_accumulation * ranks.world()} equal '
                        'parts (grad_accumulation times processes) of 8, 12, 16 ... images')
    folder = Path('results') / c.run
    with held(folder) if ranks.rank() == 0 else nullcontext():
        run_steps(c, part, folder)


def run_steps(c, part, folder):
    """All that is left of the training; `part` images go through the network at a time."""
    steps, state = plan(c, folder)
    if not steps:
        return ranks.wait()
    data = ranks.one_after_another(lambda: TrainingSet(c, {step['min_num_class'] for step in steps}))
    if state['model'] and state['ids'] != data.ids:
        raise UserError(f'{folder}/last.pth knows other ids than {c.data_dir}/train.csv with reviewed.csv; choose another run')
    if state['fold_images'] not in (None, data.fold_images):
        raise UserError(f'the validation fold of {folder} is no longer that of {c.data_dir}/train.csv: photographs were added, '
                        'removed or repaired, so learned ones would validate; choose another run')
    if len(data.valid_rows) < ranks.world():
        raise UserError(f'{ranks.world()} processes are more than the {len(data.valid_rows)} validation images; start fewer')
    if state['model']:
        print(describe(c.device, c.precision))  # the log has said where it began
    else:
        for note in [describe(c.device, c.precision), *data.notes]:
            say(state, note)
        if c.grad_accumulation > 1:
            say(state, f'batches of {c.batch_size} in {c.grad_accumulation} parts of {part}: triplets and batch norm within each')
    if c.model_name.startswith('timm/') and any(step['freeze'] for step in steps):
        freeze_early(build_backbone(c.model_name, c.height, c.width))  # those that cannot be frozen are refused now
    # An evaluation sees each image and its mirror, forward; a backward pass takes twice the time of that.
    clock = Clock(state['elapsed'], 0, each=2 * len(data.valid_rows) / (3 * c.batch_size))
    for step in steps:
        clock.limit = 60 * c.max_minutes * step['share']
        if state['step'] != step['step']:
            state = fresh(state, step, state['elapsed'])
        try:
            state = train_step(c, step, data, folder, state, clock)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            state = None  # told below, where nothing holds on to that memory any more
        if state is None:
            raise UserError(out_of_memory(c, data, part))
        if 'cuda' in c.device:
            gc.collect()  # the step's network and optimizer hold one another, in the GPU's memory
    print(f'finished: {folder}/best.pth; now python test.py --data_dir {c.data_dir} --run {c.run}')
    ranks.wait()


def build(c, step, data, folder, state):
    """The step's network, its early layers frozen if it says so, with the weights of `state`, or those it starts from."""
    torch.manual_seed(c.seed)
    net = whale_net(vars(c), data.classes)
    if state['model']:
        checkpoint.fill(net, state, folder / 'last.pth')
    elif step['checkPoint_start'] != 0:
        path = checkpoint.find(folder, step['checkPoint_start'], before_step=step['step'])
        loaded = checkpoint.load(path)
        if loaded['ids'] != data.ids:
            raise UserError(f'{path} knows other ids than {c.data_dir}/train.csv; train from checkPoint_start = 0')
        checkpoint.fill(net, loaded, path)
    elif c.pretrained:
        ranks.one_after_another(lambda: load_imagenet(net.backbone, c.model_name))
    if step['freeze']:
        freeze_early(net.backbone)
    if ranks.world() > 1 and 'cuda' in c.device:
        net = convert_sync_batchnorm(net)  # timm's, which knows that some of its norms hold an activation too
    return net.to(c.device, memory_format=torch.channels_last)


def train_step(c, step, data, folder, state, clock):
    """Train one step to its end, or until interrupted; returns its last state."""
    net = build(c, step, data, folder, state)
    if not c.w_local:
        net.local.requires_grad_(False)  # it gets no gradient, which other processes would wait for
    kind, decay = (torch.optim.AdamW, 0.05) if c.stages == 'cosine' else (torch.optim.Adam, c.weight_decay)
    optimizer = kind([p for p in net.parameters() if p.requires_grad], lr=step['lr'], betas=(0.9, 0.99),
                     weight_decay=decay, fused=True)
    why_not = compile_network(net, c.compile, c.device)
    # the same weights, with gradients averaged; some networks of timm have layers that nothing asks
    model = DistributedDataParallel(net, find_unused_parameters='timm/' in c.model_name) if ranks.world() > 1 else net
    if ranks.rank() == 0:  # written first, when nothing is refused any more
        lines = ''.join(f'{name} = {value!r}\n' for name, value in vars(c).items())
        write_whole(folder / 'constants.txt', lambda path: Path(path).write_text(lines, encoding='utf-8'))
    rows = data.rows[step['min_num_class']]
    sampler = BatchSampler(np.where(rows, data.labels.numpy(), -1), c.batch_size, data.classes,
                           c.seed + 1000 * step['step'])
    strength = c.strength if c.pretrained else c.strength_scratch
    group, amp = data.group.to(c.device), amp_dtype(c.precision, c.device)
    sums = torch.zeros(len(MEASURED) + 1, device=c.device)
    if state['model']:
        checkpoint.fill_optimizer(optimizer, sums, state, folder / 'last.pth')
    bad = torch.tensor(NEVER, device=c.device)  # the first iteration whose loss is not finite
    if not state['iteration']:
        state['mark'] = clock.elapsed()
        say(state, f'step {step["step"]}: min_num_class {step["min_num_class"]} ({len(sampler.ids)} ids, '
                   f'{sampler.iterations_per_pass} iterations a pass), freeze {step["freeze"]}, lr {step["lr"]:g}, '
                   f'checkPoint_start {step["checkPoint_start"]}')
        if why_not:
            say(state, f'not compiled: {why_not}')
        elif net._compiled_call_impl:
            say(state, 'the first iteration compiles the network, which may take minutes')
        say(state, HEADER)

    def snapshot(finished=False):
        return dict(state, model=net.state_dict(), optimizer=optimizer.state_dict(), sums=sums.cpu(), ids=data.ids,
                    fold_images=data.fold_images, finished=finished, elapsed=clock.elapsed(), constants=vars(c),
                    rows=step['rows'], start=step['start'], first=step['first'])

    train_mode(net)
    # With a time limit nobody knows how many iterations there will be; the table's last column has the time left.
    total = None if c.max_minutes else c.max_iters
    bar = progress_bar(total=total, initial=state['iteration'], desc=f'step {step["step"]}', unit='it')
    with Interrupt() as interrupt, bar:
        while not state['finished'] and not ranks.any_of(interrupt.asked):
            batch = data.batch(ranks.share(sampler.batch(state['iteration'])), pin='cuda' in c.device)
            crops, masks, labels, flips, weight = (part.to(c.device, non_blocking=True) for part in batch)
            # resumes without stored states; each process has random numbers of its own
            torch.manual_seed((100 * c.seed + step['step']) * 10 ** 8 + state['iteration'] + 10 ** 15 * ranks.rank())
            images = augment(crops, masks, flips, c.height, c.width, MARGIN, strength)  # (B, 4, H, W)
            labels = flip_labels(labels, flips, data.num_ids, c.flip_is_new_id)  # (B,)
            if not state['iteration'] and step['step'] == step['first'] and ranks.rank() == 0:
                names = data.ids * (data.classes // data.num_ids) + [NEW_WHALE]
                plot_batch(folder / 'batch.png', images,
                           [names[label] + ' mirrored' * flip for label, flip in zip(labels.tolist(), flips.tolist())])
            if c.stages == 'cosine':
                done = torch.tensor(clock.elapsed() / clock.limit if c.max_minutes else state['iteration'] / c.max_iters)
                done = ranks.total(done, torch.distributed.ReduceOp.MAX).item()  # on the CPU; one clock for all processes
                for settings in optimizer.param_groups:
                    settings['lr'] = step['lr'] * min(20 * done, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
            measured = learn(c, model, optimizer, images, labels, group, amp, state['threshold'], weight)  # (9,)
            sums += measured
            bad = torch.where(torch.isfinite(measured[0]), bad, bad.clamp(max=state['iteration']))
            state['iteration'] += 1
            bar.update()
            out_of_time = ranks.any_of(clock.over())
            evaluate_now = state['iteration'] % c.eval_every == 0 or state['iteration'] >= c.max_iters or out_of_time
            if state['iteration'] % 20 == 0 or evaluate_now:  # the only places that wait for the device
                mean = dict(zip(MEASURED, (sums / sums[-1]).tolist()))
                left = f', {duration(max(0, 60 * c.max_minutes - clock.elapsed()))} left' if c.max_minutes else ''
                bar.set_postfix_str(f'loss {mean["loss"]:.3f}, MAP@5 {mean["train_map5"]:.3f}{left}', refresh=False)
                refuse_bad_loss(bad, data, sampler, folder)
            if evaluate_now:
                began = clock.elapsed()
                ranks.total(sums).div_(ranks.world())
                row = evaluate(c, optimizer.param_groups[0]['lr'], step, data, net, amp, state, sums, sampler)
                row.update(zip(('img_s', 'left', 'seconds'), pace(c, step, state, began, sums[-1].item())))
                state['evaluations'] = state['evaluations'] + [row]
                say(state, format_row(row))
                sums.zero_()
                state['mark'] = clock.elapsed()
                enough = step['min_num_class'] > 0 and row['train_map5'] >= 0.98 or \
                    state['since_best'] >= c.patience and c.stages != 'cosine'
                state['finished'] = out_of_time or state['iteration'] >= c.max_iters or enough
                if ranks.rank() == 0:
                    now = snapshot(state['finished'])
                    state['kept'], same = checkpoint.keep_best(folder, now, row['valid_map5'])
                    save(folder, {**now, 'kept': state['kept']}, same)
                ranks.wait()  # the next step reads what the first process has written by now
                clock.measure(began)
                train_mode(net)
        stopped = ranks.any_of(interrupt.asked)
        if stopped and not state['finished']:
            refuse_bad_loss(bad, data, sampler, folder)
            ranks.total(sums).div_(ranks.world())
            if ranks.rank() == 0:
                save(folder, snapshot())
            ranks.wait()  # torchrun ends all processes when one has gone
    if stopped and not (state['finished'] and step['last']):
        print(f'stopped at iteration {state["iteration"]}; the same command goes on from there', file=sys.stderr)
        sys.exit(130)
    return state


def save(folder, state, same=None):
    """The log, its table and picture, then last.pth, from where it goes on: killed in between, it writes them again.

    `same`: a file that holds this state, if it was one of the best.
    """
    lines, table = '\n'.join(state['log']) + '\n', pd.DataFrame(state['evaluations'])
    write_whole(folder / 'log.txt', lambda path: Path(path).write_text(lines, encoding='utf-8'))
    write_whole(folder / 'evaluations.csv', lambda path: table.to_csv(path, index=False))
    if len(table):
        plot_curves(table, folder / 'curves.png')
    if same:
        checkpoint.link(same, folder / 'last.pth')
    else:
        checkpoint.save(folder / 'last.pth', state)


def evaluate(c, lr, step, data, net, amp, state, sums, sampler):
    """Score the validation fold (image and mirror) and choose the threshold there; one row of the log, times apart."""
    for buffer in net.buffers() if ranks.world() > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # without a GPU batch norm's statistics differ between processes
    rows = np.array_split(data.valid_rows, ranks.world())[ranks.rank()]
    scores, _ = predict(net, data.crops, rows, c.height, c.width, data.num_ids, c.flip_is_new_id, device=c.device, amp=amp)
    scores = ranks.gather_uneven(scores)  # (Q, N)
    state['threshold'], valid_map5 = choose_threshold(scores, data.valid_truth)
    places = rank_of_truth(scores, data.valid_truth, state['threshold'])
    state['since_best'] = 0 if valid_map5 > state['best'] else state['since_best'] + 1
    state['best'] = max(valid_map5, state['best'])
    mean = dict(zip(MEASURED, (sums / sums[-1]).tolist()))
    return dict(step=step['step'], iteration=state['iteration'], epoch=state['iteration'] / sampler.iterations_per_pass,
                lr=lr, **mean, valid_top1=top_k(places, 1).item(), valid_top5=top_k(places, 5).item(),
                valid_map5=valid_map5, threshold=state['threshold'])


def pace(c, step, state, seconds, iterations):
    """Images a second since `mark` (the end of the last evaluation), the longest time left as a text, seconds so far."""
    each = (seconds - state['mark']) / iterations
    left = (c.max_iters - state['iteration']) * each
    if c.max_minutes:
        rest = 60 * c.max_minutes - seconds
        left = min(left, rest) if step['last'] else rest
    return c.batch_size / each, duration(max(left, 0)), seconds


def refuse_bad_loss(bad, data, sampler, folder):
    """If a loss was not finite, name the images of its batch and stop, before the weights reach a checkpoint."""
    iteration = int(ranks.total(bad, torch.distributed.ReduceOp.MIN))
    if iteration == NEVER:
        return
    path = folder / f'not_finite_{iteration:06d}.txt'
    names = '\n'.join(data.train['Image'].iloc[sampler.batch(iteration)[:, 0]]) + '\n'
    write_whole(path, lambda temporary: Path(temporary).write_text(names))
    raise UserError(f'the loss of iteration {iteration} is not finite; its images are named in {path} and the last good '
                    'checkpoint is untouched: lower lr, or look at those images')


def say(state, line):
    """A line for the log and the screen."""
    state['log'] = state['log'] + [line]
    tqdm.write(line)


if __name__ == '__main__':
    main(sys.argv[1:])
