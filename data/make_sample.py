"""Draws the sample: a small synthetic set of fluke photographs in Kaggle's layout, with boxes, masks and the truth.

    python -m data.make_sample [--out data/sample] [--seed 0]

An animal is a flat picture of its fluke (pigment and outline), a photograph is one view of it: the picture bent, tilted,
lit, splashed and set into a sea. Animals and photographs have their own random streams, so the files do not depend on
how many processes draw them.
"""
import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.errors import UserError, exit_clearly

version = 1             # raise it when the drawing changes: older samples are then drawn again
num_ids = 100           # known animals
single_share = 0.40     # of the ids have one training image, as in the competition
max_images = 15         # training images of the most photographed animal
new_whale_share = 0.38  # of the training images
test_new_share = 0.30   # of the test images
mirror_share = 0.10     # of the ids look like the mirror image of another id

plan_stream, animal_stream, photo_stream = range(3)
canvas_h, canvas_w, canvas_scale = 300, 450, 205    # flat picture of a fluke; pixels per half span
centre_x, centre_y = canvas_w / 2, 140              # the root of the trailing edge on the canvas


def random_names(rng, prefix, digits, suffix, count):
    """`count` different names of random hexadecimal digits."""
    names = set()
    while len(names) < count:
        names.add(f'{prefix}{int(rng.integers(16 ** digits)):0{digits}x}{suffix}')
    return list(rng.permutation(sorted(names)))


def plan_photographs(seed, num_ids):
    """Decide who is photographed how often: DataFrame (Image, Id, animal, split), one row a photograph."""
    rng = np.random.default_rng([seed, plan_stream])
    num_single = round(single_share * num_ids)
    sizes = np.minimum(rng.geometric(0.14, num_ids) + 1, max_images)
    sizes[:num_single] = 1
    num_named = sizes.sum()
    num_new = round(num_named * new_whale_share / (1 - new_whale_share))
    num_test = round(2.4 * num_ids)
    num_test_new = round(num_test * test_new_share)
    num_test_single = round(0.12 * num_test)
    repeated = np.arange(num_single, num_ids)
    known = np.concatenate([rng.choice(num_single, num_test_single),
                            np.resize(rng.permutation(repeated), num_test - num_test_new - num_test_single)])
    # the unnamed animals of training and test are different ones; some come back in a second photograph
    unnamed = num_ids + np.sort(rng.integers(0, round(0.8 * num_new), num_new))
    unnamed_test = 2 * num_ids + num_new + np.sort(rng.integers(0, round(0.8 * num_test_new) + 1, num_test_new))
    animal = np.concatenate([np.repeat(np.arange(num_ids), sizes), unnamed, known, unnamed_test])
    ids = np.array(random_names(rng, 'w_', 7, '', num_ids))
    plan = pd.DataFrame({
        'Image': random_names(rng, '', 9, '.jpg', len(animal)),
        'Id': np.where(animal < num_ids, ids[np.minimum(animal, num_ids - 1)], 'new_whale'),
        'animal': animal,
        'split': np.where(np.arange(len(animal)) < num_named + num_new, 'train', 'test')})
    return plan.sort_values('Image', ignore_index=True)


def noise(rng, height, width, rows, columns):
    """Smooth random field (height, width), standard normal at `rows` x `columns` knots."""
    knots = rng.standard_normal((max(2, round(rows)), max(2, round(columns)))).astype(np.float32)
    return cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC)


def smoothstep(x, low, high):
    """0 below `low`, 1 above `high`, smooth between."""
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def draw_outline(rng):
    """Outline of a fluke from behind, in half spans from the notch, y down: (points, 2)."""
    t = np.linspace(0, 1, 120)                                          # from the notch to a tip
    sweep, chord, convex, blunt = rng.uniform([0.10, 0.38, 1.6, 0.5], [0.30, 0.56, 2.6, 0.8])
    notch, hump, hook = rng.uniform(0.04, 0.13), rng.uniform(-0.06, 0.10), rng.uniform(0.0, 0.16)
    edges = []
    for side in (-1, 1):
        trailing = -sweep * t ** 1.15 - (hump + rng.normal(0, 0.02)) * np.sin(np.pi * t) - hook * t ** 9
        leading = trailing[-1] + (sweep + chord) * (1 - t ** (convex + rng.normal(0, 0.1))) ** blunt
        teeth = np.interp(t, np.linspace(0, 1, 40), rng.normal(0, rng.uniform(0.006, 0.018), 40))
        for _ in range(rng.poisson(1.5)):                               # old wounds
            teeth += rng.uniform(0.02, 0.07) * np.exp(-((t - rng.uniform(0.1, 0.9)) / rng.uniform(0.01, 0.025)) ** 2)
        trailing = trailing + teeth * np.minimum(1, 6 * (1 - t)) + notch * np.exp(-t / 0.05)
        s = np.linspace(0, 1, 20)                                       # the tail stock, mostly under water
        stock = np.stack([side * (0.11 + 0.16 * (1 - s) ** 2), leading[32] + (0.8 - leading[32]) * s], 1)
        edges += [np.concatenate([np.stack([side * t, trailing], 1), np.stack([side * t, leading], 1)[:32:-1], stock])]
    return np.concatenate([edges[0], edges[1][::-1]])


def draw_marks(rng, albedo):
    """Scars, rake marks and barnacles on `albedo` (H, W) uint8, each light on dark skin or dark on light skin."""
    for _ in range(rng.poisson(9)):
        x, y = rng.uniform(10, canvas_w - 10), rng.uniform(40, canvas_h - 60)
        angle, length, bend = rng.uniform(0, np.pi), rng.uniform(15, 80), rng.normal(0, 0.15)
        s = np.linspace(-0.5, 0.5, 9)[:, None]
        along = np.array([np.cos(angle), np.sin(angle)])
        line = [x, y] + length * (s * along + bend * (4 * s * s - 1) * along[::-1] * [-1, 1])
        colour = 215 if albedo[int(y), int(x)] < 110 else 25
        copies, gap = (rng.integers(3, 6), rng.uniform(4, 8)) if rng.random() < 0.25 else (1, 0)
        for k in range(copies):
            shifted = np.int32(8 * (line + k * gap * along[::-1] * [-1, 1]))
            cv2.polylines(albedo, [shifted], False, colour, 1 + int(rng.random() < 0.25), cv2.LINE_AA, 3)
    for _ in range(rng.poisson(4)):
        x, y = rng.uniform(10, canvas_w - 10), rng.uniform(40, canvas_h - 90)
        for dx, dy in rng.normal(0, 12, (rng.poisson(6), 2)):
            spot = (int(np.clip(x + dx, 0, canvas_w - 1)), int(np.clip(y + dy, 0, canvas_h - 1)))
            cv2.circle(albedo, spot, int(rng.integers(1, 4)), 200 if albedo[spot[::-1]] < 110 else 40, -1, cv2.LINE_AA)


@functools.lru_cache(maxsize=32)
def draw_animal(seed, animal, num_ids):
    """The flat picture of one fluke: (canvas_h, canvas_w, 2) float32, reflectance and coverage, both 0..1."""
    num_mirrored = round(mirror_share * num_ids)
    if num_ids - num_mirrored <= animal < num_ids:
        # the twin is some animal elsewhere among the ids; a few scars of its own keep this one from being a copy
        picture = draw_animal(seed, animal - num_ids // 2, num_ids)[:, ::-1].copy()
        albedo = np.uint8(255 * picture[..., 0])
        draw_marks(np.random.default_rng([seed, animal_stream, animal]), albedo)
        picture[..., 0] = albedo / np.float32(255)
        return picture
    rng = np.random.default_rng([seed, animal_stream, animal])
    outline = draw_outline(rng) * canvas_scale + [centre_x, centre_y]
    cover = np.zeros((canvas_h, canvas_w), np.uint8)
    cv2.fillPoly(cover, [np.int32(outline * 8)], 255, cv2.LINE_AA, 3)
    depth = cv2.distanceTransform((cover > 127).astype(np.uint8), cv2.DIST_L2, 5) / canvas_scale
    across = np.abs(np.arange(canvas_w, dtype=np.float32) - centre_x) / canvas_scale    # (W,) 0 notch, 1 tip

    white = rng.uniform(-2.2, 1.8) + rng.uniform(0.5, 2.5) * (smoothstep(across, 0.05, 0.6) - 0.5)  # the centre is darker
    for rows, columns, strength in [(4, 7, 1.1), (9, 14, 1.0), (25, 38, 0.5), (75, 110, 0.35)]:
        white = white + strength * noise(rng, canvas_h, canvas_w, rows, columns)
    streaks = noise(rng, canvas_h, canvas_w, 14, 90) * rng.uniform(0, 0.5)
    white = white + streaks - rng.uniform(2, 5) * np.exp(-depth / rng.uniform(0.015, 0.05))          # dark rim
    albedo = np.uint8(255 * (0.06 + 0.84 * smoothstep(white, -0.7, 0.7)))
    draw_marks(rng, albedo)
    return np.dstack([albedo, cover]).astype(np.float32) / 255


def draw_view(rng):
    """Random pose: function from photograph coordinates (half spans, y down) to canvas pixels (map_x, map_y)."""
    angle, tilt, shear = np.deg2rad(rng.normal(0, 5)), rng.uniform(0.6, 1.0), rng.normal(0, 0.07)
    perspective = rng.normal(0, 0.07, 2).clip(-0.2, 0.2)
    yaw = rng.normal(0, 0.07)
    span = np.clip([1 - yaw + rng.normal(0, 0.04), 1 + yaw + rng.normal(0, 0.04)], 0.65, 1.2)   # left and right lobe
    rise, curl = rng.normal(0.03, 0.09) + rng.normal(0, 0.03, 2), rng.normal(0, 0.05, 2)

    def view(x, y):
        x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        x, y = x / (1 + perspective[0] * x + perspective[1] * y), y / (1 + perspective[0] * x + perspective[1] * y)
        side = (x > 0).astype(int)
        u = x / span[side]
        v = (y + rise[side] * np.abs(u) + curl[side] * u * u) / tilt
        u = u + shear * v * np.minimum(1, np.abs(v))
        return np.float32(u * canvas_scale + centre_x), np.float32(v * canvas_scale + centre_y)
    return view


def place_fluke(rng, cover, view, height, width):
    """Choose water line and framing: (scale in pixels per half span, x and y of the notch, y of the water)."""
    grid_x, grid_y = np.meshgrid(np.linspace(-1.5, 1.5, 120), np.linspace(-1.2, 1.2, 96))
    covered = cv2.remap(cover, *view(grid_x, grid_y), cv2.INTER_LINEAR) > 0.5
    base, tips = grid_y[covered & (np.abs(np.abs(grid_x) - 0.4) < 0.06)].max(), grid_y[covered].min()
    water = base + rng.normal(0.04, 0.06) - (rng.uniform(0, 0.2) if rng.random() < 0.1 else 0)
    water = max(water, (base + tips) / 2)
    covered &= grid_y < water
    x0, x1, y0, y1 = grid_x[covered].min(), grid_x[covered].max(), grid_y[covered].min(), grid_y[covered].max()
    scale = min(rng.uniform(0.45, 0.95) * width / (x1 - x0), 0.9 * height / (y1 - y0))
    left = rng.uniform(0.02, 0.98) * (width - scale * (x1 - x0)) * 0.96 + 0.02 * width
    top = rng.uniform(0.1, 0.8) * (height - scale * (y1 - y0))
    return scale, left - scale * x0, top - scale * y0, top + scale * (water - y0)


seas = np.float32([[24, 48, 82], [40, 78, 120], [88, 136, 186], [112, 120, 124], [64, 84, 84], [150, 160, 168],
                   [218, 222, 226], [34, 40, 50]]) / 255


def draw_sea(rng, height, width):
    """Waves, glints and sometimes a horizon: (height, width, 3) float32, about 0..1."""
    colour = seas[rng.integers(len(seas))] * rng.uniform(0.8, 1.2) + rng.normal(0, 0.012, 3)
    waves = sum(strength * noise(rng, height, width, height / size, width / (size * rng.uniform(3, 6)))
                for size, strength in [(28, 0.4), (11, 0.5), (5, 0.5), (2.5, 0.4)])
    shade = rng.uniform(0.03, 0.14) * waves + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, height)[:, None]
    sea = colour * (1 + shade[..., None]) + 0.5 * shade[..., None]
    sea = sea + 0.4 * smoothstep(waves, *(rng.uniform(1.2, 2.4) + np.array([0, 1.0])))[..., None]
    if rng.random() < 0.25:
        horizon = rng.uniform(0.05, 0.5) * height + rng.normal(0, 0.03) * (np.arange(width) - width / 2)
        sky = rng.uniform(0.55, 0.9) + rng.uniform(0, 1) * np.array([-0.12, -0.02, 0.06]) + 0.04 * noise(rng, height, width, 3, 4)[..., None]
        above = smoothstep(horizon - np.arange(height)[:, None], -1, 1)[..., None]
        sea = sea * (1 - above) + sky * above
    return np.float32(sea), np.float32(colour)


def draw_photograph(seed, number, animal, num_ids):
    """One photograph: (image (H, W, 3) uint8 RGB, mask (H, W) uint8 0/255, jpeg quality, slack of the box (4,))."""
    rng = np.random.default_rng([seed, photo_stream, number])
    fluke = draw_animal(seed, animal, num_ids)
    width = int(rng.integers(300, 421))
    height = round(width / np.clip(rng.normal(2.0, 0.3), 1.45, 2.8))
    view = draw_view(rng)
    scale, notch_x, notch_y, water = place_fluke(rng, fluke[..., 1], view, height, width)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    albedo, cover = cv2.split(cv2.remap(fluke, *view((x - notch_x) / scale, (y - notch_y) / scale), cv2.INTER_LINEAR))
    image, sea_colour = draw_sea(rng, height, width)

    surface = water + scale * 0.04 * noise(rng, 1, width, 2, width / 25)                # (1, W) the water in front
    cover = cover * smoothstep(surface - y, -1, 1)
    lobes = smoothstep(x, notch_x - 0.15 * scale, notch_x + 0.15 * scale)
    light = rng.uniform(0.7, 1.1) + rng.normal(0, 0.15) * (lobes - 0.5) + 0.1 * noise(rng, height, width, 3, 4)
    haze = rng.uniform(0, 0.18) + 0.06 * noise(rng, height, width, 4, 8)                # wet skin mirrors the sky
    pigment = 0.05 + rng.uniform(0.55, 1.0) * albedo                                    # backlit flukes lose theirs
    skin = light[..., None] * pigment[..., None] + haze[..., None] * (0.4 + 0.6 * sea_colour)
    image = image * (1 - cover[..., None]) + skin * cover[..., None]
    mask = np.uint8(255 * (cover > 0.5))

    near = np.exp(-np.abs(y - surface) / (scale * rng.uniform(0.03, 0.14)) - np.abs(x - notch_x) / (scale * 0.9))
    froth = sum(noise(rng, height, width, height / size, width / (2 * size)) for size in (2, 5, 11))
    foam = smoothstep(froth + rng.uniform(1, 5) * near, 1.0, 4.5) * smoothstep(near, 0.0, 0.4)
    drops = (rng.random((height, width)) < rng.exponential(0.002) * np.exp(-np.abs(y - water) / (0.5 * scale)))
    foam = np.maximum(foam, cv2.GaussianBlur(np.float32(drops), (0, 0), 0.7) * 3).clip(0, 1)
    if rng.random() < 0.12:                                                              # a veil of spray
        foam = np.maximum(foam, 0.75 * smoothstep(noise(rng, height, width, 4, 5) + 0.2 * froth, 0.6, 2.2))
    image = image * (1 - foam[..., None]) + (0.75 + 0.2 * sea_colour) * foam[..., None]

    image = np.clip(image, 0, 1.2) * rng.uniform([0.94, 0.97, 0.94], [1.06, 1.03, 1.06])
    if rng.random() < 1 / 3:
        image = np.repeat(image.mean(2, keepdims=True), 3, 2) * rng.uniform(0.9, 1.2)
    image = np.clip(0.5 + rng.uniform(0.75, 1.2) * (np.clip(image, 0, 1) ** rng.uniform(0.65, 1.25) - 0.5), 0, 1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    image = image + rng.uniform(0, 0.03) * rng.standard_normal((height, width, 1))
    return np.uint8(255 * np.clip(image, 0, 1)), mask, int(rng.integers(55, 91)), rng.uniform(-0.01, 0.05, 4)


def write_photograph(job):
    """Draw one photograph of the plan and write image and mask; returns its box (x0, y0, x1, y1), ends excluded."""
    folder, seed, number, animal, num_ids, name, split = job
    cv2.setNumThreads(1)
    image, mask, quality, slack = draw_photograph(seed, number, animal, num_ids)
    cv2.imwrite(f'{folder}/{split}/{name}', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    cv2.imwrite(f'{folder}/masks/{Path(name).stem}.png', mask)
    x, y, w, h = cv2.boundingRect(mask)
    box = np.array([x, y, x + w, y + h]) + slack * [-w, -h, w, h]
    return np.clip(np.rint(box), 0, [mask.shape[1], mask.shape[0]] * 2).astype(int)


def is_drawn(out, stamp):
    """Whether the folder `out` holds the whole sample that `stamp` describes."""
    try:
        same = json.loads((out / 'sample.json').read_text()) == stamp
    except (OSError, ValueError):
        return False
    tables = ['train.csv', 'bboxes.csv', 'sample_submission.csv', 'test_labels.csv']
    return same and all((out / table).is_file() for table in tables) and all(
        len(os.listdir(out / folder)) == stamp['images'][folder] for folder in ('train', 'test'))


def draw_sample(out='data/sample', seed=0, num_ids=num_ids, workers=None):
    """Draw the whole sample into the folder `out`, unless it is there already; the same files for the same seed.

    It is drawn beside `out` and renamed, so it is there whole or not at all. Returns whether anything was drawn.
    Raises UserError when `out` holds something else.
    """
    out = Path(out)
    plan = plan_photographs(seed, num_ids)
    stamp = {'version': version, 'seed': seed, 'num_ids': num_ids, 'images': plan.split.value_counts().to_dict()}
    if is_drawn(out, stamp):
        print(f'{out} already holds this sample')
        return False
    if out.exists() and not (out / 'sample.json').is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'{out} holds something that is not a sample: remove it, or choose another folder with --out')
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f'.{out.name}-'))
    try:
        for name in ('train', 'test', 'masks'):
            (folder / name).mkdir()
        jobs = [(str(folder), seed, row.Index, row.animal, num_ids, row.Image, row.split)
                for row in plan.sort_values(['animal', 'Image']).itertuples()]   # neighbours share an animal's picture
        workers = workers or os.cpu_count()
        if workers == 1:
            boxes = [write_photograph(job) for job in tqdm(jobs, 'photographs')]
        else:
            context = multiprocessing.get_context('spawn')
            with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
                boxes = list(tqdm(pool.map(write_photograph, jobs, chunksize=8), 'photographs', len(jobs)))
        boxes = pd.DataFrame(boxes, columns=['x0', 'y0', 'x1', 'y1'])
        boxes.insert(0, 'Image', [job[5] for job in jobs])
        boxes.sort_values('Image').to_csv(folder / 'bboxes.csv', index=False)
        train, test = (plan.loc[plan.split == split, ['Image', 'Id']] for split in ('train', 'test'))
        train.to_csv(folder / 'train.csv', index=False)
        test.to_csv(folder / 'test_labels.csv', index=False)
        test.assign(Id=' '.join(['new_whale', *sorted(train.Id.unique())[:4]])).to_csv(
            folder / 'sample_submission.csv', index=False)
        (folder / 'sample.json').write_text(json.dumps(stamp))
        os.chmod(folder, 0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return True


@exit_clearly
def main():
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description='Draw the synthetic fluke data set.')
    parser.add_argument('--out', default='data/sample', help='folder to make (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed is another set of animals (default: 0)')
    args = parser.parse_args()
    draw_sample(args.out, args.seed)


if __name__ == '__main__':
    main()
