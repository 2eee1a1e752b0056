"""Draws the sample: synthetic fluke photographs in Kaggle's layout, with boxes, masks and the truth.

An animal is a flat picture of its fluke, outline and pigment; a photograph is one view of it: the picture
bent, tilted, lit, splashed and set into a sea. Animals and photographs have their own random streams, so that
the files do not depend on how many draw at a time.
"""
import argparse
import functools
import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from utils.errors import UserError, exit_clearly
from utils.log import in_threads

version = 2             # raise it when the drawing changes, so that older samples are not taken for this one
num_ids = 100           # known animals
single_share = 0.40     # of the ids have one training image, as in the competition
max_images = 18         # training images of the most photographed animal
new_whale_share = 0.38  # of the training images
test_images = 2.4       # for each id
test_new_share = 0.30   # of them are of animals without an id
test_single_share = 0.09  # of them are of ids with one training image
mirror_share = 0.10     # of the ids look like the mirror image of another id

plan_stream, animal_stream, photo_stream = range(3)
canvas_h, canvas_w, canvas_scale = 300, 450, 205    # flat picture of a fluke; pixels per half span
centre_x, centre_y = canvas_w / 2, 140              # the root of the trailing edge on the canvas
sea_colours = np.array([[24, 48, 82], [40, 78, 120], [88, 136, 186], [112, 120, 124],
                        [64, 84, 84], [150, 160, 168], [218, 222, 226], [34, 40, 50]]) / 255


def plan_photographs(seed, num_ids):
    """Decide who is photographed how often: DataFrame (Image, Id, animal, split), one row a photograph."""
    rng = np.random.default_rng([seed, plan_stream])

    def names(count, pattern, digits):
        return [pattern.format(number) for number in rng.choice(16 ** digits, count, replace=False)]

    num_single = round(single_share * num_ids)
    num_more = num_ids - num_single
    tail = -8 * np.log1p(-(rng.permutation(num_more) + 0.5) / num_more)         # exponential, mean 8
    sizes = np.append(np.ones(num_single, int), np.int64(np.minimum(2 + tail, max_images)))
    num_new = round(sizes.sum() * new_whale_share / (1 - new_whale_share))
    num_test = round(test_images * num_ids)
    test_new, test_single = round(test_new_share * num_test), round(test_single_share * num_test)
    repeated = np.resize(rng.permutation(np.arange(num_single, num_ids)), num_test - test_new - test_single)
    # no unnamed animal is in both parts; some come back in a second photograph
    unnamed = num_ids + rng.integers(0, round(0.8 * num_new), num_new)
    unnamed_test = num_ids + num_new + rng.integers(0, round(0.8 * test_new) + 1, test_new)
    train = np.concatenate([np.repeat(np.arange(num_ids), sizes), unnamed])
    animal = np.concatenate([train, rng.choice(num_single, test_single), repeated, unnamed_test])
    ids = np.append(names(num_ids, 'w_{:07x}', 7), 'new_whale')
    split = np.where(np.arange(len(animal)) < len(train), 'train', 'test')
    plan = {'Image': names(len(animal), '{:09x}.jpg', 9), 'Id': ids[np.minimum(animal, num_ids)]}
    return pd.DataFrame({**plan, 'animal': animal, 'split': split}).sort_values('Image', ignore_index=True)


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
    t = np.linspace(0, 1, 120)      # from the notch to a tip
    sweep, chord, convex, blunt = rng.uniform([0.10, 0.38, 1.6, 0.5], [0.30, 0.56, 2.6, 0.8])
    notch, hump, hook = rng.uniform(0.04, 0.13), rng.uniform(-0.06, 0.10), rng.uniform(0.0, 0.16)
    edges = []
    for side in (-1, 1):
        trailing = -sweep * t ** 1.15 - (hump + rng.normal(0, 0.02)) * np.sin(np.pi * t) - hook * t ** 9
        leading = trailing[-1] + (sweep + chord) * (1 - t ** (convex + rng.normal(0, 0.1))) ** blunt
        teeth = np.interp(t, np.linspace(0, 1, 40), rng.normal(0, rng.uniform(0.006, 0.018), 40))
        for _ in range(rng.poisson(1.5)):       # old wounds
            depth, place, width = rng.uniform([0.02, 0.1, 0.01], [0.07, 0.9, 0.025])
            teeth += depth * np.exp(-((t - place) / width) ** 2)
        trailing = trailing + teeth * np.minimum(1, 6 * (1 - t)) + notch * np.exp(-t / 0.05)
        s = np.linspace(0, 1, 20)               # the tail stock, mostly under water
        stock = np.stack([side * (0.11 + 0.16 * (1 - s) ** 2), leading[32] + (0.8 - leading[32]) * s], 1)
        edges += [np.stack([side * t, trailing], 1), np.stack([side * t, leading], 1)[:32:-1], stock]
    return np.concatenate([*edges[:3], np.concatenate(edges[3:])[::-1]])


def draw_marks(rng, albedo):
    """Scars, rake marks and barnacles on `albedo` (H, W) uint8, light on dark skin and dark on light skin."""
    def place():
        x, y = rng.uniform([10, 40], [canvas_w - 10, canvas_h - 70])
        return x, y, (215 if albedo[int(y), int(x)] < 110 else 25)

    for _ in range(rng.poisson(9)):
        x, y, colour = place()
        angle, length, bend = rng.uniform(0, np.pi), rng.uniform(15, 80), rng.normal(0, 0.15)
        s = np.linspace(-0.5, 0.5, 9)[:, None]
        along, across = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        line = [x, y] + length * (s * along + bend * (4 * s * s - 1) * across)
        copies, gap = (rng.integers(3, 6), rng.uniform(4, 8)) if rng.random() < 0.25 else (1, 0)
        lines = [np.int32(8 * (line + k * gap * across)) for k in range(copies)]
        cv2.polylines(albedo, lines, False, colour, 1 + int(rng.random() < 0.25), cv2.LINE_AA, 3)
    for _ in range(rng.poisson(4)):
        x, y, colour = place()
        for centre in rng.normal([x, y], 12, (rng.poisson(6), 2)).astype(np.int32):
            cv2.circle(albedo, centre.tolist(), int(rng.integers(1, 4)), colour, -1, cv2.LINE_AA)


@functools.lru_cache(maxsize=32)
def draw_animal(seed, animal, num_ids):
    """The flat picture of one fluke: (canvas_h, canvas_w, 2) float32, reflectance and cover, both 0..1."""
    rng = np.random.default_rng([seed, animal_stream, animal])
    if num_ids - round(mirror_share * num_ids) <= animal < num_ids:     # another's mirror, and more scars
        picture = draw_animal(seed, animal - num_ids // 2, num_ids)[:, ::-1]
        albedo = np.uint8(255 * picture[..., 0])
        draw_marks(rng, albedo)
        return np.dstack([albedo / np.float32(255), picture[..., 1]])
    outline = draw_outline(rng) * canvas_scale + [centre_x, centre_y]
    cover = np.zeros((canvas_h, canvas_w), np.uint8)
    cv2.fillPoly(cover, [(outline * 8).astype(np.int32)], 255, cv2.LINE_AA, 3)
    depth = cv2.distanceTransform((cover > 127).astype(np.uint8), cv2.DIST_L2, 5) / canvas_scale
    outward = smoothstep(np.abs(np.arange(canvas_w) - centre_x) / canvas_scale, 0.05, 0.6)      # (W,)
    white = rng.normal(-0.2, 0.9) + rng.uniform(0.5, 2.5) * (outward - 0.5)
    for rows, columns, strength in [(4, 7, 1.3), (9, 14, 1.2), (25, 38, 0.4), (75, 110, 0.3)]:
        white = white + strength * noise(rng, canvas_h, canvas_w, rows, columns)
    white = white + rng.uniform(0, 0.5) * noise(rng, canvas_h, canvas_w, 14, 90)        # streaks
    white = white - rng.uniform(2, 5) * np.exp(-depth / rng.uniform(0.015, 0.05))       # dark rim
    albedo = np.uint8(255 * (0.06 + 0.84 * smoothstep(white, -0.7, 0.7)))
    draw_marks(rng, albedo)
    return np.dstack([albedo, cover]).astype(np.float32) / 255


def draw_view(rng, reach=1):
    """Random pose: a function from photograph coordinates (half spans, y down) to canvas pixels.

    `reach` multiplies how far a pose strays from the flat fluke; at most 3.
    """
    angle, tilt, shear = np.deg2rad(rng.normal(0, 5 * reach)), rng.uniform(1 - 0.25 * reach, 1.0), rng.normal(0, 0.08 * reach)
    perspective, yaw = rng.normal(0, 0.05 * reach, 2).clip(-0.2, 0.2), rng.normal(0, 0.05 * reach)
    span = np.clip([1 - yaw, 1 + yaw] + rng.normal(0, 0.04 * reach, 2), 1 - 0.35 * min(reach, 2), 1.2)  # of left and right lobe
    rise, curl = rng.normal(0.03, 0.05 * reach) + rng.normal(0, 0.02 * reach, 2), rng.normal(0, 0.03 * reach, 2)

    def view(x, y):
        x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        x, y = np.array([x, y]) / (1 + perspective[0] * x + perspective[1] * y)
        side = (x > 0).astype(int)
        u = x / span[side]
        v = (y + rise[side] * np.abs(u) + curl[side] * u * u) / tilt
        u = u + shear * v * np.minimum(1, np.abs(v))
        return np.float32(u * canvas_scale + centre_x), np.float32(v * canvas_scale + centre_y)
    return view


def cut_at_water(rng, cover, view):
    """Choose the water line: x0, x1, y0, y1 of what is above it, and its y, in half spans from the notch."""
    grid_x, grid_y = np.meshgrid(np.linspace(-1.5, 1.5, 120), np.linspace(-1.2, 1.2, 96))
    covered = cv2.remap(cover, *view(grid_x, grid_y), cv2.INTER_LINEAR) > 0.5
    tips, base = grid_y[covered].min(), grid_y[covered & (np.abs(np.abs(grid_x) - 0.4) < 0.06)].max()
    occlusion = rng.uniform(0, 0.2) if rng.random() < 0.1 else 0
    water = max(base + rng.normal(0.04, 0.06) - occlusion, (base + tips) / 2)
    covered &= grid_y < water
    return grid_x[covered].min(), grid_x[covered].max(), grid_y[covered].min(), grid_y[covered].max(), water


def place_fluke(rng, cover):
    """Choose size, pose and framing of a photograph: height, width, view, pixels per half span, x, y of the notch, y of
    the water."""
    width, view = int(rng.integers(300, 421)), draw_view(rng)
    height = round(width / np.clip(rng.normal(2.0, 0.3), 1.45, 2.8))
    x0, x1, y0, y1, water = cut_at_water(rng, cover, view)
    scale = min(rng.uniform(0.45, 0.95) * width / (x1 - x0), 0.9 * height / (y1 - y0))
    left = rng.uniform(0.04, 0.96) * (width - scale * (x1 - x0))
    top = rng.uniform(0.1, 0.8) * (height - scale * (y1 - y0))
    return height, width, view, scale, left - scale * x0, top - scale * y0, top + scale * (water - y0)


def draw_sea(rng, height, width):
    """Waves, glints, sometimes a horizon: image (height, width, 3), about 0..1, and the water's colour."""
    colour = rng.choice(sea_colours) * rng.uniform(0.8, 1.2) + rng.normal(0, 0.012, 3)
    waves = sum(strength * noise(rng, height, width, height / size, width / (size * rng.uniform(3, 6)))
                for size, strength in [(28, 0.4), (11, 0.5), (5, 0.5), (2.5, 0.4)])
    shade = rng.uniform(0.04, 0.17) * waves + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, height)[:, None]
    sea = colour * (1 + shade[..., None]) + 0.5 * shade[..., None]
    sea = sea + 0.4 * smoothstep(waves - rng.uniform(1.2, 2.4), 0, 1)[..., None]
    if rng.random() < 0.25:
        horizon = rng.uniform(0.05, 0.5) * height + rng.normal(0, 0.03) * (np.arange(width) - width / 2)
        sky = rng.uniform(0.55, 0.9) + rng.random() * np.array([-0.12, -0.02, 0.06])
        sky = sky + 0.04 * noise(rng, height, width, 3, 4)[..., None]
        above = smoothstep(horizon - np.arange(height)[:, None], -1, 1)[..., None]
        sea = sea * (1 - above) + sky * above
    return sea, colour


def draw_foam(rng, near):
    """Foam, drops, sometimes a veil of spray, 0..1; `near` (H, W) is 1 at the water line and 0 far off."""
    height, width = near.shape
    froth = sum(noise(rng, height, width, height / size, width / (2 * size)) for size in (2, 5, 11))
    foam = smoothstep(froth + rng.uniform(1, 5) * near, 1.0, 4.5) * smoothstep(near, 0.0, 0.4)
    drops = np.float32(rng.random((height, width)) < rng.exponential(0.002) * near ** 0.2)
    foam = np.maximum(foam, 3 * cv2.GaussianBlur(drops, (0, 0), 0.7))
    if rng.random() < 0.12:
        foam = np.maximum(foam, 0.75 * smoothstep(noise(rng, height, width, 4, 5) + 0.2 * froth, 0.6, 2.2))
    return foam.clip(0, 1)


def develop(rng, image):
    """Camera and darkroom: colour cast, greyscale for a third, exposure, contrast, blur, noise; to uint8."""
    image = image * rng.uniform([0.94, 0.97, 0.94], [1.06, 1.03, 1.06])
    if rng.random() < 1 / 3:
        image = np.repeat(image.mean(2, keepdims=True), 3, 2) * rng.uniform(0.9, 1.2)
    image = image.clip(0, 1) ** rng.uniform(0.65, 1.25)
    image = (0.5 + rng.uniform(0.75, 1.2) * (image - 0.5)).clip(0, 1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    image = image + rng.uniform(0, 0.03) * rng.standard_normal((*image.shape[:2], 1))
    return np.uint8(255 * image.clip(0, 1))


def draw_photograph(rng, fluke, place=place_fluke, develop=develop):
    """One photograph of a flat `fluke`, framed by `place`: image (H, W, 3) uint8 RGB and mask (H, W) uint8 0/255."""
    height, width, view, scale, notch_x, notch_y, water = place(rng, fluke[..., 1])
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    fluke = cv2.remap(fluke, *view((x - notch_x) / scale, (y - notch_y) / scale), cv2.INTER_LINEAR)
    albedo, cover = np.split(fluke, 2, axis=2)      # (H, W, 1) each
    sea, sea_colour = draw_sea(rng, height, width)
    surface = water + scale * 0.04 * noise(rng, 1, width, 2, width / 25)        # (1, W) the water in front
    cover = cover * smoothstep(surface - y, -1, 1)[..., None]
    lobe = smoothstep(x, notch_x - 0.15 * scale, notch_x + 0.15 * scale)        # 0 left, 1 right
    light = rng.uniform(0.7, 1.1) + rng.normal(0, 0.15) * (lobe - 0.5) + 0.1 * noise(rng, height, width, 3, 4)
    haze = rng.uniform(0, 0.18) + 0.06 * noise(rng, height, width, 4, 8)        # wet skin mirrors the sky
    skin = light[..., None] * (0.05 + rng.uniform(0.6, 1.0) * albedo)
    image = sea * (1 - cover) + (skin + haze[..., None] * (0.4 + 0.6 * sea_colour)) * cover
    near = np.abs(y - surface) / rng.uniform(0.03, 0.14) + np.abs(x - notch_x) / 0.9
    foam = draw_foam(rng, np.exp(-near / scale))[..., None]
    image = image * (1 - foam) + (0.75 + 0.2 * sea_colour) * foam
    return develop(rng, image), np.uint8(255 * (cover[..., 0] > 0.5))


def write_photograph(job):
    """Draw and write one photograph of the plan and its mask; returns its box (x0, y0, x1, y1) in pixels."""
    folder, seed, num_ids, number, animal, name, split = job
    rng = np.random.default_rng([seed, photo_stream, number])
    image, mask = draw_photograph(rng, draw_animal(seed, animal, num_ids))
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 91))]
    (folder / split / name).write_bytes(cv2.imencode('.jpg', image[..., ::-1], quality)[1])
    (folder / 'masks' / name).with_suffix('.png').write_bytes(cv2.imencode('.png', mask)[1])
    x, y, w, h = cv2.boundingRect(mask)
    box = [x, y, x + w, y + h] + rng.uniform(-0.01, 0.08, 4) * [-w, -h, w, h]
    return np.rint(box).clip(0, [mask.shape[1], mask.shape[0]] * 2).astype(int)


def draw_sample(out='data/sample', seed=0, num_ids=num_ids):
    """Draw the sample into the folder `out` unless it is there already; returns whether anything was drawn.

    The same seed gives the same bytes. Drawn beside `out` and then renamed, it is there whole or not at all.
    Raises UserError when `out` holds something else.
    """
    out, plan = Path(out), plan_photographs(seed, num_ids)
    stamp, stamped = json.dumps({'version': version, 'seed': seed, 'num_ids': num_ids}), out / 'sample.json'
    if stamped.is_file() and stamped.read_bytes() == stamp.encode():
        files = ['train.csv', 'bboxes.csv', 'sample_submission.csv', 'test_labels.csv', *(plan['split'] + '/' + plan['Image'])]
        gone = [name for name in files if not (out / name).is_file()]
        if gone:
            raise UserError(f'{out} is no longer the whole sample, {gone[0]} is not there: save what you have added, remove the '
                            'folder, and draw it again')
        print(f'{out} already holds this sample')
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'{out} holds something else than this sample: remove it, or choose another folder with --out')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as temporary:
        folder = Path(temporary) / 'sample'
        for name in ('train', 'test', 'masks'):
            (folder / name).mkdir(parents=True)
        ordered = plan.sort_values(['animal', 'Image'])     # neighbours share an animal's picture
        jobs = [(folder, seed, num_ids, *row) for row in ordered[['animal', 'Image', 'split']].itertuples()]
        boxes = in_threads(write_photograph, jobs, 'photographs', few=0)
        boxes = pd.DataFrame(boxes, ordered['Image'], ['x0', 'y0', 'x1', 'y1'])
        boxes.sort_index().to_csv(folder / 'bboxes.csv')
        train, test = (plan.loc[plan['split'] == split, ['Image', 'Id']] for split in ('train', 'test'))
        guess = test.assign(Id=' '.join(['new_whale', *sorted(set(train['Id']) - {'new_whale'})[:4]]))
        for name, table in [('train', train), ('test_labels', test), ('sample_submission', guess)]:
            table.to_csv(folder / f'{name}.csv', index=False)
        (folder / stamped.name).write_text(stamp)
        os.replace(folder, out)
    return True


@exit_clearly
def main():
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description='Draw the synthetic fluke data set.')
    parser.add_argument('--out', default='data/sample', help='folder to make (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed draws other animals (default: 0)')
    draw_sample(**vars(parser.parse_args()))


if __name__ == '__main__':
    main()
