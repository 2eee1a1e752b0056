"""Train a network that names whales. Edit the constants below, then: python train.py

Each constant can also be given on the command line, e.g. python train.py --run first --lr 1e-4
Results go to results/RUN: log.txt, curves.png, evaluations.csv, best.pth, last.pth. Stopped? Run the same command again.
"""
from utils.clock import Clock  # first: max_minutes counts the slow imports too

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.augment import augment, flip_labels
from data.decode import check_images
from data.images import MARGIN, Crops
from data.sampler import BatchSampler
from data.tables import NEW_WHALE, load_tables, training_rows, validation_fold
from models.backbone import check_model_name, freeze_early, load_imagenet, train_mode
from models.losses import joint_loss
from models.whale_net import WhaleNet
from utils import checkpoint
from utils.constants import read_constants, write_constants
from utils.device import amp_dtype, choose_device
from utils.errors import UserError, exit_clearly
from utils.figures import plot_curves
from utils.files import write_whole
from utils.interrupt import Interrupt, ignore_interrupt
from utils.log import HEADER, duration, format_row, progress_bar, write_log
from utils.metrics import average_precision, choose_threshold, rank_of_truth, top_k
from utils.scores import predict
from utils.steps import fresh, plan

# The three steps of the method: edit these five, train until it no longer improves, edit, train on. Or stages = 'all'.
model_name = 'senet154'     # senet154, seresnext101, seresnext50, seresnet50/101/152, seresnext26, seresnext14, timm/NAME
freeze = False              # True in steps 2 and 3: train only layer3, layer4 and the heads
min_num_class = 10          # only ids with at least this many images (validation taken out); 0 in steps 2 and 3: all
checkPoint_start = 0        # 0: ImageNet weights; or an iteration, 'best' (of the step before), 'last', a path
lr = 3e-4                   # Adam's step; 3e-5 in step 3
stages = 'one'              # 'one': the step that the constants above describe; 'all': the rows of `schedule` in one go
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
pretrained = True           # ImageNet weights (a file in weights/, else downloaded); False: random weights

# Loss and batch
w_sigmoid = 1.0             # weight of the binary classifiers' loss
w_triplet = 1.0             # weight of the triplet loss on the global embedding
w_local = 1.0               # weight of the triplet loss on the aligned strips; 0 leaves the branch out
margin = 0.3                # of both triplet losses
hardest = 30                # classifiers of each image that teach: those most wrong
batch_size = 48             # images: 12 x (anchor, positive, another id, new_whale)
images_per_id = 0           # 0: the items above; K: P ids x K images, and a quarter new_whale
strength = (1.0, 1.0)       # of the augmentation, geometric and photometric: 0 none, 1 the reference's ranges
strength_scratch = (0.75, 0.5)  # the same with pretrained = False, where full ranges cost too much time (see the README)
weight_decay = 2e-4         # Adam's L2
clip = 5.0                  # largest gradient norm

# Running
max_iters = 100000          # of each step, at the latest
eval_every = 200            # iterations between evaluations; each also writes last.pth
patience = 20               # a step ends after so many evaluations without a better validation MAP@5
max_minutes = 0.0           # of wall clock for the whole training; 0: no limit
seed = 0                    # same seed, same machine: same weights
device = 'auto'             # 'auto', 'cuda', 'cuda:1', 'cpu'
threads = 0                 # CPU threads; 0: all cores
workers = 0                 # processes that read crops, on Linux; 0: the training process itself
precision = 'auto'          # 'auto': bf16 where the hardware has it; 'bf16', 'fp32'
# ----------------------------------------------------------------------------------------------------------------------

positive_int = (int, lambda v: v > 0, 'a whole number above 0')
count = (int, lambda v: v >= 0, 'a whole number, 0 or more')
weight = (float, lambda v: v >= 0, 'a number, 0 or more')
flag = (bool, lambda v: True, 'True or False')
text = (str, lambda v: bool(v), 'a text in quotes')
rows_of_stages = (list, lambda v: v and all(
    len(row) == 3 and isinstance(row[0], int) and isinstance(row[1], bool) and 0 < row[2] < 1 for row in v),
    'a list of (min_num_class, freeze, lr)')
two_strengths = (tuple, lambda v: len(v) == 2 and all(isinstance(s, (int, float)) and 0 <= s <= 2 for s in v),
                 'two numbers between 0 and 2')
RULES = dict(
    model_name=text, freeze=flag, min_num_class=count, lr=(float, lambda v: 0 < v < 1, 'a number between 0 and 1'),
    checkPoint_start=((int, str), lambda v: v != '', "0, an iteration, 'best', 'last' or a path"),
    stages=(str, lambda v: v in ('one', 'all'), "'one' or 'all'"), schedule=rows_of_stages, schedule_scratch=rows_of_stages,
    stage_share=(tuple, lambda v: all(isinstance(s, (int, float)) and s > 0 for s in v), 'a positive number for each stage'),
    data_dir=text, run=text, fold=(int, lambda v: v in range(5), '0, 1, 2, 3 or 4'), flip_is_new_id=flag,
    skip_bad_images=flag, height=(int, lambda v: v >= 32, 'at least 32 pixels'),
    width=(int, lambda v: v >= 32, 'at least 32 pixels'), cache_dir=text, pretrained=flag,
    w_sigmoid=weight, w_triplet=weight, w_local=weight, margin=weight, hardest=positive_int,
    batch_size=(int, lambda v: v >= 8 and v % 4 == 0, 'a multiple of 4, at least 8'), images_per_id=count,
    strength=two_strengths, strength_scratch=two_strengths, weight_decay=weight,
    clip=(float, lambda v: v > 0, 'a number above 0'), max_iters=positive_int, eval_every=positive_int,
    patience=positive_int, max_minutes=weight,
    seed=(int, lambda v: 0 <= v < 10 ** 6, 'a whole number, 0 to 999999'), device=text, threads=count, workers=count,
    precision=(str, lambda v: v in ('auto', 'bf16', 'fp32'), "'auto', 'bf16' or 'fp32'"))

NEVER = 10 ** 9  # later than any iteration


@exit_clearly
def main(argv):
    c = read_constants(__file__, argv, RULES)
    c.model_name = check_model_name(c.model_name)
    ignored = [name for name in ('min_num_class', 'freeze', 'lr') if c.stages == 'all' and
               any(part.split('=')[0] == f'--{name}' for part in argv)]
    if ignored:
        raise UserError(f"--{ignored[0]} has no effect with stages = 'all': give it in the rows of schedule "
                        '(schedule_scratch when pretrained = False)')
    if c.images_per_id > c.batch_size * 3 // 4:
        raise UserError(f'images_per_id = {c.images_per_id} is more than three quarters of batch_size = {c.batch_size}: '
                        'lower it')
    c.device = choose_device(c.device, c.threads)
    folder = Path('results') / c.run
    steps, state = plan(c, folder)
    if not steps:
        return
    data = Data(c)
    if state['model'] and state['ids'] != data.ids:
        raise UserError(f'{folder}/last.pth knows other ids than {c.data_dir}/train.csv; choose another run')
    if state['fold_images'] not in (None, data.fold_images):
        raise UserError(f'the validation fold of {folder} is no longer that of {c.data_dir}/train.csv: photographs were added, '
                        'removed or repaired, so learned ones would validate; choose another run')
    if state['model'] is None:
        for note in data.notes:
            say(state, note)
    clock = Clock(state['elapsed'], 0)
    for step in steps:
        clock.limit = 60 * c.max_minutes * step['share']
        if state['step'] != step['step']:
            state = fresh(state, step, state['elapsed'])
        state = train_step(c, step, data, folder, state, clock)
    print(f'finished: {folder}/best.pth; now python test.py --data_dir {c.data_dir} --run {c.run}')


class Data:
    """Everything that the training reads: tables, the fold, crops, labels. Built once, before any step."""

    def __init__(self, c):
        self.tables = check_images(load_tables(c.data_dir, c.flip_is_new_id), c.skip_bad_images)
        train = self.tables.train.sort_values('Image', ignore_index=True)  # the CSV's order changes nothing
        self.train, self.ids, self.num_ids = train, self.tables.ids, self.tables.num_ids
        self.classes = self.num_ids * (2 if c.flip_is_new_id else 1)
        self.labels = torch.from_numpy(train['label'].to_numpy().copy())  # (n,)
        self.crops = Crops(train, c.height, c.width, c.cache_dir)
        readable = self.crops.readable(c.skip_bad_images)
        fold = validation_fold(train, c.fold)  # (n,) bool
        self.valid = fold & readable
        self.rows = {number: training_rows(train, fold, number) & readable for number in self._min_num_classes(c)}
        fewest = min(rows.sum() for rows in self.rows.values())
        if c.batch_size > fewest:
            raise UserError(f'batch_size = {c.batch_size} is more than the {fewest} training images; lower it')
        animal = np.arange(self.num_ids) if self.tables.group is None else self.tables.group
        both = np.concatenate([animal, animal + self.num_ids])[:self.classes]  # a mirror image is another animal
        self.group = torch.tensor([*both, 2 * self.num_ids + 1])  # (classes + 1,)
        self.valid_rows = np.flatnonzero(self.valid)
        self.fold_images = train['Image'].iloc[self.valid_rows].tolist()
        self.valid_truth = self.labels[self.valid_rows].clamp(max=self.num_ids)  # (Q,) N: new_whale
        named = self.labels[self.valid_rows] < self.classes
        self.notes = [f'{len(train)} training images, {self.num_ids} ids, {self.classes} classes; '
                      f'fold {c.fold}: {named.sum()} ids + {(~named).sum()} {NEW_WHALE}', *self.tables.notes]

    def _min_num_classes(self, c):
        if c.stages == 'one':
            return {c.min_num_class}
        return {row[0] for row in (c.schedule if c.pretrained else c.schedule_scratch)}

    def __getitems__(self, batch):
        """A list of (row, flip) -> raw crops, masks, labels, flips of the whole batch."""
        rows, flips = np.array(batch).T
        return *self.crops[rows], self.labels[rows], torch.from_numpy(flips)


def build(c, step, data, folder, state):
    """The step's network, its early layers frozen if it says so, with the weights of `state`, or those it starts from."""
    torch.manual_seed(c.seed)
    net = WhaleNet(c.model_name, data.classes, c.height, c.width)
    if state['model']:
        checkpoint.fill(net, state, folder / 'last.pth')
    elif step['checkPoint_start'] != 0:
        path = checkpoint.find(folder, step['checkPoint_start'], before_step=step['step'])
        loaded = checkpoint.load(path)
        if loaded['ids'] != data.ids:
            raise UserError(f'{path} knows other ids than {c.data_dir}/train.csv; train from checkPoint_start = 0')
        checkpoint.fill(net, loaded, path)
    elif c.pretrained:
        load_imagenet(net.backbone, c.model_name)
    if step['freeze']:
        freeze_early(net.backbone)
    return net.to(c.device, memory_format=torch.channels_last)


def train_step(c, step, data, folder, state, clock):
    """Train one step to its end, or until interrupted; returns its last state."""
    net = build(c, step, data, folder, state)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=step['lr'], betas=(0.9, 0.99),
                                 weight_decay=c.weight_decay, fused=True)
    if state['model']:
        optimizer.load_state_dict(state['optimizer'])
    write_constants(c, folder / 'constants.txt')  # the first thing written: all that can be refused has been by now
    rows = data.rows[step['min_num_class']]
    sampler = BatchSampler(np.where(rows, data.labels.numpy(), -1), c.batch_size, data.classes, c.images_per_id,
                           c.seed + 1000 * step['step'], state['iteration'])
    batches = iter(DataLoader(data, batch_sampler=sampler, num_workers=c.workers, collate_fn=lambda batch: batch,
                              pin_memory='cuda' in c.device, worker_init_fn=ignore_interrupt,
                              multiprocessing_context='fork' if c.workers else None))
    strength = c.strength if c.pretrained else c.strength_scratch
    group, amp = data.group.to(c.device), amp_dtype(c.precision, c.device)
    sums = torch.zeros(9, device=c.device) if state['sums'] is None else state['sums'].to(c.device)
    bad = torch.tensor(NEVER, device=c.device)  # the first iteration whose loss is not finite
    if not state['iteration']:
        state['mark'] = clock.elapsed()
        say(state, f'step {step["step"]}: min_num_class {step["min_num_class"]} ({len(sampler.ids)} ids, '
                   f'{sampler.iterations_per_pass} iterations a pass), freeze {step["freeze"]}, lr {step["lr"]:g}, '
                   f'checkPoint_start {step["checkPoint_start"]}')
        say(state, HEADER)

    def snapshot(finished=False):
        return dict(state, model=net.state_dict(), optimizer=optimizer.state_dict(), sums=sums.cpu(), ids=data.ids,
                    fold_images=data.fold_images,
                    finished=finished, elapsed=clock.elapsed(), constants=vars(c), rows=step['rows'], start=step['start'],
                    first=step['first'])

    train_mode(net)
    # With a time limit nobody knows how many iterations there will be; the table's last column has the time left.
    total = None if c.max_minutes else c.max_iters
    bar = progress_bar(total=total, initial=state['iteration'], desc=f'step {step["step"]}', unit='it')
    with Interrupt() as interrupt, bar:
        while not state['finished'] and not interrupt.asked:
            crops, masks, labels, flips = (part.to(c.device, non_blocking=True) for part in next(batches))
            torch.manual_seed((100 * c.seed + step['step']) * 10 ** 8 + state['iteration'])  # resumes without stored states
            images = augment(crops, masks, flips, c.height, c.width, MARGIN, strength)  # (B, 4, H, W)
            labels = flip_labels(labels, flips, data.num_ids, c.flip_is_new_id)  # (B,)
            with torch.autocast(torch.device(c.device).type, amp, enabled=amp is not None):
                outputs = net(images.contiguous(memory_format=torch.channels_last), local=c.w_local > 0)
            loss, parts = joint_loss(outputs, labels, group, c.w_sigmoid, c.w_triplet, c.w_local, c.margin, c.hardest)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), c.clip)
            optimizer.step()
            bad = torch.where(torch.isfinite(loss), bad, bad.clamp(max=state['iteration']))
            with torch.no_grad():
                ranks = rank_of_truth(outputs[1].sigmoid(), labels, state['threshold'])  # (B,)
                sums += torch.stack([loss.detach(), *parts, average_precision(ranks).mean(), top_k(ranks, 1), top_k(ranks, 5),
                                     torch.ones_like(loss)]).float()
            state['iteration'] += 1
            bar.update()
            out_of_time = clock.over()
            evaluate_now = state['iteration'] % c.eval_every == 0 or state['iteration'] >= c.max_iters or out_of_time
            if state['iteration'] % 20 == 0 or evaluate_now:  # the only places that wait for the device
                mean = (sums / sums[-1]).tolist()
                left = f', {duration(60 * c.max_minutes - clock.elapsed())} left' if c.max_minutes else ''
                bar.set_postfix_str(f'loss {mean[0]:.3f}, MAP@5 {mean[5]:.3f}{left}')
                refuse_bad_loss(int(bad), data, sampler, folder)
            if evaluate_now:
                began = clock.elapsed()
                row = evaluate(c, step, data, net, amp, state, sums, sampler)
                row.update(zip(('img_s', 'left', 'seconds'), pace(c, step, state, began, sums[-1].item())))
                state['evaluations'] = state['evaluations'] + [row]
                say(state, format_row(row))
                sums.zero_()
                state['mark'] = clock.elapsed()
                state['finished'] = out_of_time or state['iteration'] >= c.max_iters or \
                    state['since_best'] >= c.patience or (step['min_num_class'] > 0 and row['train_map5'] >= 0.98)
                state['kept'] = checkpoint.keep_best(folder, step['step'], state['iteration'], row['valid_map5'],
                                                     state['kept'], snapshot(state['finished']))
                checkpoint.save(folder / 'last.pth', snapshot(state['finished']))
                write_log(folder, state['log'], state['evaluations'])
                plot_curves(folder / 'evaluations.csv', folder / 'curves.png')
                clock.measure(began)
                train_mode(net)
    if interrupt.asked and not state['finished']:
        refuse_bad_loss(int(bad), data, sampler, folder)
        checkpoint.save(folder / 'last.pth', snapshot())
        write_log(folder, state['log'], state['evaluations'])
    if interrupt.asked and not (state['finished'] and step['last']):
        print(f'stopped at iteration {state["iteration"]}; the same command goes on from there', file=sys.stderr)
        sys.exit(130)
    return state


def evaluate(c, step, data, net, amp, state, sums, sampler):
    """Score the validation fold (image and mirror) and choose the threshold there; one row of the log, times apart."""
    scores, _ = predict(net, data.crops, data.valid_rows, c.height, c.width, data.num_ids, c.flip_is_new_id,
                        device=c.device, amp=amp)  # (Q, N)
    state['threshold'], valid_map5 = choose_threshold(scores, data.valid_truth)
    ranks = rank_of_truth(scores, data.valid_truth, state['threshold'])
    state['since_best'] = 0 if valid_map5 > state['best'] else state['since_best'] + 1
    state['best'] = max(valid_map5, state['best'])
    mean = (sums / sums[-1]).tolist()
    names = ('loss', 'sigmoid', 'triplet', 'local', 'active', 'train_map5', 'train_top1', 'train_top5')
    return dict(step=step['step'], iteration=state['iteration'], epoch=state['iteration'] / sampler.iterations_per_pass,
                lr=step['lr'], **dict(zip(names, mean)), valid_top1=top_k(ranks, 1).item(), valid_top5=top_k(ranks, 5).item(),
                valid_map5=valid_map5, threshold=state['threshold'])


def pace(c, step, state, seconds, iterations):
    """Images a second since `mark` (the end of the last evaluation), the longest time left as a text, seconds so far."""
    each = (seconds - state['mark']) / iterations
    left = (c.max_iters - state['iteration']) * each
    if c.max_minutes:
        rest = 60 * c.max_minutes - seconds
        left = min(left, rest) if step['last'] else rest
    return c.batch_size / each, duration(max(left, 0)), seconds


def refuse_bad_loss(iteration, data, sampler, folder):
    """If a loss was not finite, name the images of its batch and stop, before the weights reach a checkpoint."""
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
