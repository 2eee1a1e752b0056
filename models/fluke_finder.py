"""Find the fluke in each photograph, its box and its mask. Edit the constants below, then: python -m models.fluke_finder

Learns from the boxes (bboxes.csv) and masks (masks/, masks.csv) in data_dir, and from drawn photographs; then writes
bboxes.csv, masks/NAME.png and fluke_finder.csv for the photographs in train/, test/ and playground/train/. Boxes and masks
that were there stay; those of an earlier run are written anew. results/RUN gets weights.pth, and found.png: look at it.
"""
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from data.augment import photometric, to_input
from data.decode import BadImage, find_bad_images, read_image, read_mask
from data.make_sample import draw_sample
from data.tables import BOX, ODD, add_boxes_and_masks, list_files, read_csv
from data.wild_photographs import draw_wild
from models.finder_net import FlukeFinder, box_of, find, finder_loss
from utils import checkpoint
from utils.constants import SHARED_RULES, one_of, read_constants, rule
from utils.device import amp_dtype, choose_device, require_works
from utils.errors import UserError, exit_clearly
from utils.figures import plot_found
from utils.files import write_whole
from utils.log import progress_bar

data_dir = 'data/sample'    # photographs in train/, test/, playground/train/; boxes and masks are written here
run = 'fluke_finder'        # weights.pth and found.png go to results/RUN
train_on = 'both'           # 'given': the boxes and masks in data_dir; 'drawn': drawn photographs; 'both': half and half
photographs = 2000          # to learn from, of each kind, at most; each takes 0.2 MB of memory
iterations = 1200           # with batches of batch_size; 6 minutes on a CPU core
batch_size = 16
lr = 3e-3                   # the highest learning rate
height = 128                # the network sees each photograph stretched to height x width; multiples of 32
width = 256
min_confidence = 0.7        # below it an image keeps the whole frame and no mask, and is listed
seed = 0
device = 'auto'             # 'auto', 'cuda', 'cuda:1', 'cpu'
threads = 0                 # CPU threads; 0: all cores
precision = 'auto'          # 'auto': bf16 where the hardware has it; 'bf16', 'fp32'
# ----------------------------------------------------------------------------------------------------------------------

RULES = {
    **{name: SHARED_RULES[name] for name in ('data_dir', 'run', 'device', 'threads', 'precision')},
    **one_of('train_on', 'given', 'drawn', 'both'),
    **rule('photographs iterations', int, lambda v: v > 0, 'a whole number above 0'),
    **rule('batch_size', int, lambda v: v > 1, 'a whole number above 1'),
    **rule('lr min_confidence', float, lambda v: 0 < v < 1, 'a number between 0 and 1'),
    **rule('height width', int, lambda v: v > 0 and v % 32 == 0, 'a multiple of 32'),
    **rule('seed', int, lambda v: 0 <= v < 10 ** 6, 'a whole number, 0 to 999999')}
LEARNING = 'train_on photographs iterations batch_size lr height width seed precision'.split()  # what weights depend on


@exit_clearly
def main(argv):
    c = read_constants(globals(), argv, RULES)
    c.device, folder, results = choose_device(c.device, c.threads), Path(c.data_dir), Path('results') / c.run
    require_works(c.device)
    if c.data_dir == 'data/sample' and not folder.exists():
        draw_sample(folder)
    frame = list_photographs(folder)
    found, shown = search(trained(c, frame, results / 'weights.pth'), frame, c)
    publish(frame, found, folder)
    if shown:
        plot_found(results / 'found.png', *zip(*shown))
    unsure = found['Image'][(found['confidence'] < c.min_confidence) & frame['x0'].isna()].tolist()
    print(f'{folder}: wrote {found["x0"].notna().sum()} boxes and {found["png"].notna().sum()} masks; look at '
          f'{results}/found.png. {len(unsure)} of {len(found)} photographs keep the whole frame, with a confidence below '
          f'{c.min_confidence} in fluke_finder.csv{": " + ", ".join(unsure[:20]) if unsure else ""}'
          f'{" ..." if len(unsure) > 20 else ""}')


def list_photographs(folder):
    """Photographs below `folder`: DataFrame Image, path, BOX, mask_path, mask_rle, mark (of the mask file), has_mask: what the
    user gave. What this script wrote (fluke_finder.csv knows) is not in them; our_box and our_mask tell where it is."""
    folders = [folder / name for name in ('train', 'test', 'playground/train')]
    paths = [part / name for part in folders for name in list_files(part)
             if not (name.startswith('.') or ODD.search(name))]
    frame = pd.DataFrame({'Image': [path.name for path in paths], 'path': list(map(str, paths))}, dtype=object)
    frame = frame.drop_duplicates('Image', ignore_index=True)
    if frame.empty:
        raise UserError(f'{folder} has no photographs in train/, test/ or playground/train/: put them there, or draw the '
                        'sample with `python -m data.make_sample`')
    stems = frame['Image'].map(lambda name: Path(name).stem)
    shared = frame[stems.duplicated(keep=False)]
    shared = shared[~shared['path'].isin(find_bad_images(shared['path']))]  # but notes beside a photograph are none
    shared = shared['Image'][stems[shared.index].duplicated(keep=False)].tolist()
    if shared:
        raise UserError(f'{folder} has photographs whose masks would share a name ({", ".join(shared[:4])}): rename one of them')
    add_boxes_and_masks((frame,), folder, [])
    written = pd.DataFrame(columns=['Image', *BOX, 'mask'])
    if (folder / 'fluke_finder.csv').is_file():
        written = read_csv(folder / 'fluke_finder.csv', written.columns)
    written = written.set_index('Image').reindex(frame['Image'])
    frame['our_box'] = (frame[BOX].to_numpy() == written[BOX].apply(pd.to_numeric, errors='coerce').to_numpy(float)).all(1)
    frame['mark'] = [checksum(Path(path).read_bytes()) if isinstance(path, str) else None for path in frame['mask_path']]
    frame['our_mask'] = (frame['mark'].to_numpy() == written['mask'].to_numpy()) & frame['mark'].notna()
    frame.loc[frame['our_box'], BOX] = np.nan
    frame.loc[frame['our_mask'], ['mask_path', 'mark']] = None
    frame['has_mask'] = frame['mask_path'].notna() | frame['mask_rle'].notna()
    return frame


def checksum(data):
    return f'crc{zlib.crc32(data):08x}'


def prepare(image, mask, box, c):
    """A photograph to learn from, at 1.25 times the network's input: image uint8, packed mask, box (4,) in -1..1, whether there
    is a mask. mask (h, w) uint8 or None; box in pixels, None: that of the mask."""
    box = np.float32(box_of(mask) if box is None else box) / np.tile(image.shape[1::-1], 2) * 2 - 1
    size = c.width * 5 // 4, c.height * 5 // 4
    bits = np.zeros(size[::-1], bool) if mask is None else cv2.resize(mask, size, interpolation=cv2.INTER_AREA) > 0
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, np.packbits(bits, axis=1), np.float32(box), mask is not None


def collect(known, c):
    """The photographs to learn from: lists of drawn ones and of those in the table, either may be empty."""
    given, rng = [], np.random.default_rng(c.seed)
    known = known.iloc[rng.permutation(len(known))[:c.photographs]]
    for row in progress_bar(known.itertuples(), total=len(known), desc='reading', unit='img'):
        try:
            image, has_box = read_image(row.path), row.x0 == row.x0
            mask = read_mask(row.mask_path, row.mask_rle, image.shape[:2]) if row.has_mask else None
        except BadImage:
            continue  # `search` names it
        if has_box or mask is not None and mask.any():
            given.append(prepare(image, mask, [row.x0, row.y0, row.x1, row.y1] if has_box else None, c))
    if not given and c.train_on == 'given':
        raise UserError(f"{c.data_dir} has no boxes and no masks of its photographs: set train_on = 'drawn'")
    numbers = progress_bar(range(c.photographs) if c.train_on != 'given' else (), desc='drawing', unit='img')
    return [prepare(*draw_wild(c.seed, number), None, c) for number in numbers], given  # type: ignore[call-arg]


def batch(items, c):
    """Augmented: images (B, 3, H, W), then mask, columns, rows, has_mask as finder_loss takes them."""
    images, masks, boxes, has_mask = (torch.from_numpy(np.stack(part)).to(c.device) for part in zip(*items))
    # scaled, mirrored, shifted; not turned, which a box cannot follow
    scale = 1 + (torch.rand(len(boxes), 2) - 0.5) * torch.tensor([0.3, 0.5])
    scale[:, 0] *= torch.randint(2, (len(boxes),)) * 2 - 1
    shift = (torch.rand(len(boxes), 2) - 0.5) * torch.tensor([0.3, 0.4])
    transform = torch.cat([scale.diag_embed(), shift[..., None]], 2)  # (B, 2, 3)
    transform = torch.cat([transform, torch.tensor([0.0, 0, 1]).expand(len(boxes), 1, 3)], 1).to(c.device)
    images, masks = to_input(images, masks, c.height, c.width, 0, transform).split((3, 1), 1)
    inside = []
    for axis, length in enumerate((c.width, c.height)):
        at = (torch.arange(length) + 0.5) * 2 / length - 1
        at = scale[:, axis, None] * at + shift[:, axis, None]  # (B, L), in the photograph
        at = at.clamp(-0.999, 0.999).to(c.device)  # to_input repeats what is at the edge
        inside.append(((at > boxes[:, axis, None]) & (at < boxes[:, axis + 2, None])).float())
    cast = 0.8 + 0.4 * torch.rand(len(boxes), 3, 1, 1, device=c.device)
    images = photometric(torch.cat([(images * cast).clamp(0, 1), masks], 1), 1.5)[:, :3]
    return images, (masks[:, 0] > 0.5).float(), *inside, has_mask


def train(c, pools):
    """A FlukeFinder that has learned from the lists of photographs, from each alike."""
    torch.manual_seed(c.seed)
    pools, rng = [pool for pool in pools if pool], np.random.default_rng(c.seed)
    net = FlukeFinder().to(c.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=c.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, c.lr, c.iterations, pct_start=0.1)
    amp, bar = amp_dtype(c.precision, c.device), progress_bar(range(c.iterations), desc='training', unit='it')
    for iteration in bar:
        chosen = [pools[k % len(pools)] for k in range(c.batch_size)]
        images, *target = batch([pool[rng.integers(len(pool))] for pool in chosen], c)
        with torch.autocast(torch.device(c.device).type, amp, amp is not None):
            outputs = net(images.contiguous(memory_format=torch.channels_last))
        loss = finder_loss(outputs, *target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5)
        optimizer.step()
        schedule.step()
        if iteration % 20 == 0:
            bar.set_postfix_str(f'loss {loss.item():.3f}', refresh=False)
    return net


def trained(c, frame, path):
    """The network of `path`, if it has learned from just these photographs with these constants; else it learns anew."""
    known = frame[(frame['x0'].notna() | frame['has_mask']) & (c.train_on != 'drawn')]
    what = known[['Image', *BOX, 'mark', 'mask_rle']].to_csv(index=False)
    key = f'{[getattr(c, name) for name in LEARNING]} {checksum(what.encode())}'
    if path.is_file():
        net, _, _, made_of = load_network(path)
        if made_of == key:
            print(f'{path} fits: no training')
            return net.to(c.device)
    net = train(c, collect(known, c)).eval()
    state = {'key': key, 'height': c.height, 'width': c.width, 'model': net.state_dict()}
    write_whole(path, lambda temporary: torch.save(state, temporary))
    return net


def load_network(path):
    """Network, height, width and key of a weights.pth. Raises UserError."""
    net = FlukeFinder().eval()
    try:
        state = checkpoint.read(path)
        net.load_state_dict(state['model'])
        return net, state['height'], state['width'], state['key']
    except Exception as error:  # torch raises many kinds for a file that is none of its own; all mean the same here
        raise UserError(f'{path} holds no fluke finder ({type(error).__name__}): delete it and train again') from error


def search(net, frame, c):
    """What to write, a row a photograph: Image, confidence, x0, y0, x1, y1, png (bytes), None where it is given or not found;
    and what to show: 48 of (image, mask, box, title), the least certain first."""
    shown, rows, show = [], [], set(np.random.default_rng(c.seed).permutation(len(frame))[:48])
    for number, row in enumerate(progress_bar(frame.itertuples(), total=len(frame), desc='finding', unit='img')):
        try:
            image = read_image(row.path)
        except BadImage as error:
            print(error, file=sys.stderr)
            rows.append((row.Image, 0.0, *[None] * 5))
            continue
        box, mask, confidence = find(net, image, c.height, c.width)
        if row.has_mask:
            mask = read_mask(row.mask_path, row.mask_rle, mask.shape)
            box, confidence = (box_of(mask), 1.0) if mask.any() else (box, confidence)
        has_box = row.x0 == row.x0
        if has_box:
            box = np.rint([row.x0, row.y0, row.x1, row.y1]).astype(int).clip(0)
            mask[:box[1]] = mask[box[3]:] = mask[:, :box[0]] = mask[:, box[2]:] = 0
        sure = confidence >= c.min_confidence
        png = cv2.imencode('.png', mask * 255)[1].tobytes() if sure and mask.any() and not row.has_mask else None
        rows.append((row.Image, confidence, *(box if sure and not has_box else [None] * 4), png))
        if number in show:
            shown.append((image, mask, box, f'{confidence:.2f} {row.Image}'))
    return pd.DataFrame(rows, columns=['Image', 'confidence', *BOX, 'png'], dtype=object), sorted(shown, key=lambda item: item[3])


def publish(frame, found, folder):
    """Write what was found. First this script's earlier boxes and masks go, then fluke_finder.csv says which are its own, and
    then these are written: killed anywhere, no later run takes them for the user's."""
    def write(table, name):
        write_whole(folder / name, lambda path: table.to_csv(path, index=False))

    paths = np.array([folder / 'masks' / f'{Path(name).stem}.png' for name in frame['Image']])
    boxes = pd.DataFrame(columns=['Image', *BOX])
    if (folder / 'bboxes.csv').is_file():
        boxes = pd.read_csv(folder / 'bboxes.csv', dtype=str, na_filter=False)
    if frame['our_box'].any():
        boxes = boxes[~boxes['Image'].isin(frame['Image'][frame['our_box']])]
        write(boxes, 'bboxes.csv')
    for path in paths[frame['our_mask']]:
        path.unlink()
    marks = [png and checksum(png) for png in found['png']]
    table = found.drop(columns='png').assign(confidence=found['confidence'].map('{:.3f}'.format), mask=marks)
    if (folder / 'fluke_finder.csv').is_file():  # photographs that are elsewhere now may come back
        before = pd.read_csv(folder / 'fluke_finder.csv', dtype=str, na_filter=False)
        table = pd.concat([table, before[~before['Image'].isin(table['Image'])]])
    write(table, 'fluke_finder.csv')
    for path, png in zip(paths, found['png']):
        if png:
            write_whole(path, lambda temporary: Path(temporary).write_bytes(png))
    if found['x0'].notna().any():
        write(pd.concat([boxes, found.loc[found['x0'].notna(), ['Image', *BOX]]]), 'bboxes.csv')


if __name__ == '__main__':
    main(sys.argv[1:])
