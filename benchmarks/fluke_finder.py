"""How well the fluke finder's boxes and masks fit given ones: `python -m benchmarks.fluke_finder PHOTOS BOXES.csv MASKS`.

PHOTOS is a folder of photographs, BOXES.csv has Image,x0,y0,x1,y1, MASKS has NAME.png or NAME.jpg; each may know only some of
the photographs, or others too. The network is that of results/RUN, which must not have learned from these. Beside it, what
needs no learning: the largest part of one side of Otsu's threshold, and the whole frame.
"""
import argparse
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from data.decode import read_image, read_mask
from data.tables import BOX, add_boxes, add_masks
from models.finder_net import box_of, find, iou
from models.fluke_finder import load_network
from utils.errors import UserError, exit_clearly


def otsu(image):
    """The fluke without learning: the side of Otsu's threshold that has less of the frame's edge, its largest part.

    image (h, w, 3) uint8 -> (h, w) uint8 0/1.
    """
    side = cv2.threshold(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    if np.concatenate([side[0], side[-1], side[:, 0], side[:, -1]]).mean() > 0.5:
        side = 1 - side
    _, label, stats, _ = cv2.connectedComponentsWithStats(side)
    return np.uint8(label == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()) if len(stats) > 1 else side


def measure(folder, boxes_csv, masks, network, height, width):
    """Overlap (IoU) with the given boxes and masks, NaN where there is none: DataFrame, a row a photograph and method."""
    paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in ('.jpg', '.jpeg', '.png')]
    frame = pd.DataFrame({'Image': [path.name for path in paths], 'path': [str(path) for path in paths]}, dtype=object)
    add_boxes((frame,), Path(boxes_csv), [])
    add_masks((frame,), Path(masks), Path(masks) / 'masks.csv', [])
    frame = frame[frame['x0'].notna() | frame['mask_path'].notna() | frame['mask_rle'].notna()]
    if frame.empty:
        raise UserError(f'neither {boxes_csv} nor {masks} knows a photograph of {folder}: check the three')
    rows = []
    for row in frame.itertuples():
        image = read_image(row.path)
        simple, whole = otsu(image), np.ones(image.shape[:2], np.uint8)
        answers = {'fluke finder': find(network, image, height, width), 'Otsu': (box_of(simple), simple, np.nan),
                   'whole frame': (box_of(whole), whole, np.nan)}
        mask = read_mask(row.mask_path, row.mask_rle, image.shape[:2]) if row.mask_path or row.mask_rle else None
        for method, (box, found, confidence) in answers.items():
            box_iou = iou(box, np.array([getattr(row, side) for side in BOX])) if row.x0 == row.x0 else np.nan
            mask_iou = np.nan if mask is None else (mask & found).sum() / max(1, (mask | found).sum())
            rows.append((row.Image, method, box_iou, mask_iou, confidence))
    return pd.DataFrame(rows, columns=['Image', 'method', 'box', 'mask', 'confidence'])


@exit_clearly
def main():
    """Read the command line, measure, print means and each photograph."""
    parser = argparse.ArgumentParser(description='How well the fluke finder fits given boxes and masks.')
    parser.add_argument('photos', help='folder of photographs')
    parser.add_argument('boxes', help='CSV of boxes')
    parser.add_argument('masks', help='folder of masks')
    parser.add_argument('--run', default='fluke_finder', help='the weights of results/RUN (default: %(default)s)')
    options = parser.parse_args()
    network, height, width, _ = load_network(Path('results') / options.run / 'weights.pth')
    table = measure(options.photos, options.boxes, options.masks, network, height, width)
    ours = table[table['method'] == 'fluke finder'].drop(columns='method')
    print(ours.sort_values('box').round(3).to_string(index=False))
    means = table.groupby('method', sort=False)[['box', 'mask']].agg(['mean', 'min', 'count'])
    print(f'\nIntersection over union\n{means.round(3).to_string()}')


if __name__ == '__main__':
    main()
