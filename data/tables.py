"""Kaggle's CSVs -> one checked pair of tables (training, test), the label space and the validation folds.

Labels: 0..N-1 are the ids in sorted order, N..2N-1 the same ids mirrored, and the number after the last of them marks
new_whale. Everything but train.csv and train/ is optional; what is absent is said in `Tables.notes`.
"""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

NEW_WHALE = 'new_whale'
BOX = ['x0', 'y0', 'x1', 'y1']
NUM_FOLDS = 5
MAX_FOLD_IDS = 512            # ids in a validation fold: 512 and 230 new_whale on Kaggle
NEW_PER_NAMED = 31 / 69       # new_whale images for each named one in a fold: about their share of Kaggle's test set


@dataclass
class Tables:
    """Everything the files of one `data_dir` say.

    train: a row an image: Image, Id, label (int64), path, x0, y0, x1, y1 (pixels, NaN: no box), mask_path and mask_rle
        (str or None), source ('train' or 'playground'). test: the same without Id, label and source; may be empty.
    ids: the N names in sorted order. group: (N,) int64, ids that are one whale share a number; None if nobody says so.
    notes: a line for the log on each optional part.
    """
    data_dir: Path
    ids: list
    train: pd.DataFrame
    test: pd.DataFrame
    group: np.ndarray | None
    notes: list

    @property
    def num_ids(self):
        return len(self.ids)


def load_tables(data_dir, flip_is_new_id=True, check_files=True):
    """Read and check the tables under `data_dir`; a UserError names the file, the lines and what to do.

    new_whale's label is 2N, or N where a mirrored animal is the same animal (`flip_is_new_id` False).
    With `check_files` False the images listed need not exist.
    """
    data_dir = Path(data_dir)
    if not (data_dir / 'train.csv').is_file():
        what = 'holds no train.csv' if data_dir.is_dir() else 'is not a folder'
        raise UserError(f'data_dir {data_dir} {what}: unpack https://www.kaggle.com/c/humpback-whale-identification/data '
                        'so that train.csv and train/ lie in it, or draw the sample with `python -m data.make_sample`')
    train = read_labels(data_dir / 'train.csv')
    ids = sorted(set(train['Id']) - {NEW_WHALE})
    if not ids:
        raise UserError(f'{data_dir / "train.csv"} names no id but {NEW_WHALE}: label some images with their ids')
    notes = []
    train['source'] = 'train'
    _find_images(train, data_dir / 'train', data_dir / 'train.csv', check_files, notes)
    train = pd.concat([train, _read_playground(data_dir / 'playground', ids, train, check_files, notes)],
                      ignore_index=True)
    mark = (2 if flip_is_new_id else 1) * len(ids)
    train['label'] = train['Id'].map({**{name: k for k, name in enumerate(ids)}, NEW_WHALE: mark}).astype('int64')
    test = _read_test(data_dir, check_files, notes)
    _add_boxes(train, test, data_dir / 'bboxes.csv', notes)
    _add_masks(train, test, data_dir, notes)
    train = train[['Image', 'Id', 'label', 'path', *BOX, 'mask_path', 'mask_rle', 'source']]
    test = test[['Image', 'path', *BOX, 'mask_path', 'mask_rle']]
    return Tables(data_dir, ids, train, test, _read_groups(data_dir / 'duplicate_ids.csv', ids, notes), notes)


def validation_fold(train, fold, seed=0):
    """Rows of `train` that validate: boolean (rows,). `fold` 0..4 are independent draws, which may overlap.

    At most 512 and at most a third of the ids with two images or more give one image each; new_whale images are added
    until they are 31% of the fold, or half of them are in it. An id's only image and playground images stay in training.
    The draw depends on image names and on the order of the ids, not on the order of the rows.
    """
    if fold not in range(NUM_FOLDS):
        raise UserError(f'fold = {fold!r} does not exist: choose one of 0 to {NUM_FOLDS - 1}')
    rng = np.random.default_rng([seed, fold])
    rows = np.flatnonzero(train['source'] == 'train')
    rows = rows[np.argsort(train['Image'].to_numpy(str)[rows], kind='stable')]
    label, is_new = train['label'].to_numpy()[rows], (train['Id'] == NEW_WHALE).to_numpy()[rows]
    named, new = rows[~is_new], rows[is_new]
    names, counts = np.unique(label[~is_new], return_counts=True)
    repeated = names[counts >= 2]
    num_ids = min(MAX_FOLD_IDS, len(repeated) // 3)
    if num_ids == 0:
        raise UserError(f'validation takes one image of a third of the ids with two images or more, and train.csv has '
                        f'{len(repeated)} such ids: label more images')
    chosen = rng.choice(repeated, num_ids, replace=False)
    shuffled = rng.permutation(named)
    labels = train['label'].iloc[shuffled]
    first_of_chosen = (labels.isin(chosen) & ~labels.duplicated()).to_numpy()
    num_new = min(round(NEW_PER_NAMED * num_ids), len(new) // 2)
    valid = np.zeros(len(train), bool)
    valid[shuffled[first_of_chosen]] = True
    valid[rng.choice(new, num_new, replace=False)] = True
    return valid


def training_rows(train, valid, min_num_class):
    """Rows of `train` to learn from: boolean (rows,).

    Those outside `valid` that are new_whale or of an id with at least `min_num_class` images outside `valid` (0: all).
    """
    valid = np.asarray(valid)
    is_new = (train['Id'] == NEW_WHALE).to_numpy()
    count = train['Id'].map(train['Id'][~valid & ~is_new].value_counts()).fillna(0).to_numpy()
    keep = ~valid & ~is_new & (count >= min_num_class)
    if not keep.any():
        raise UserError(f'no id has min_num_class = {min_num_class} images outside validation; '
                        f'the largest has {int(count.max(initial=0))}: lower min_num_class')
    return keep | (is_new & ~valid)


def read_csv(path, columns):
    """`columns` of a CSV as text, blank lines dropped; the index holds line numbers, for messages. UserError if unfit."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False, skip_blank_lines=False,
                            index_col=False, encoding='utf-8-sig')
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): check that it is a file you may read') from error
    except (UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise UserError(f'{path} is not a CSV file ({str(error).strip()}): unpack it or save it as CSV in UTF-8') from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        has = ','.join(map(str, table.columns))[:80]
        raise UserError(f'{path} has no column {" and ".join(missing)} (its first line is {has!r}): '
                        f'it must begin with the line {",".join(columns)}')
    table.index += 2
    table = table[list(columns)].fillna('')
    return table[(table != '').any(axis=1)]


def read_labels(path, columns=('Image', 'Id')):
    """Image names, and ids where `columns` has them, of a CSV: nothing blank, no image twice, no id with a space."""
    table = read_csv(path, columns)
    if table.empty:
        raise UserError(f'{path} has no rows: it needs one line for each image')
    image = table['Image']
    _refuse(path, table, image.str.strip() == '', 'has rows without an image name', 'fill them in or delete the rows')
    _refuse(path, table, image.str.contains(r'[/\\\0]') | image.isin(['.', '..']),
            'has image names that are paths', 'write the bare file name of an image in its folder')
    _refuse(path, table, image.duplicated(keep=False), 'lists an image more than once', 'keep one row for each image')
    if 'Id' in columns:
        _refuse(path, table, table['Id'].str.strip() == '', 'has rows without an id', f'write the id or {NEW_WHALE}')
        _refuse(path, table, table['Id'].str.contains(r'\s'), 'has ids with a space in them',
                'write _ in its place, since a submission separates ids by spaces')
    return table


def _refuse(path, table, bad, what, remedy):
    """UserError that shows the first rows where `bad` is true, by line number."""
    if bad.any():
        rows = table[bad].head(5)
        shown = '; '.join(f'line {line}: {",".join(row)[:60]}' for line, row in zip(rows.index, rows.to_numpy()))
        more = ' ...' if bad.sum() > 5 else ''
        raise UserError(f'{path} {what} ({shown}{more}): {remedy}')


def _find_images(table, folder, csv, check_files, notes):
    """Add `path`; UserError when images of the table are not in the folder."""
    table['path'] = str(folder) + os.sep + table['Image']
    if not check_files:
        return
    if not folder.is_dir():
        raise UserError(f'{folder} is not there, yet {csv} lists its images: unpack the images into it')
    present = set(os.listdir(folder))
    missing = table['Image'][~table['Image'].isin(present)].tolist()
    if missing:
        raise UserError(f'{len(missing)} of the {len(table)} images that {csv} lists are not in {folder} '
                        f'({", ".join(missing[:5])}{" ..." if len(missing) > 5 else ""}): '
                        'unpack the images directly into that folder, or take their rows out of the CSV')
    unlisted = {name for name in present if not name.startswith('.')} - set(table['Image'])
    if unlisted:
        notes.append(f'{folder.name}/: {len(unlisted)} files are not in {csv.name} and are not used '
                     f'({", ".join(sorted(unlisted)[:3])}{" ..." if len(unlisted) > 3 else ""})')


def _read_playground(folder, ids, train, check_files, notes):
    """Rows of the earlier contest that can join `train`: of an id of `ids`, and not in `train` by name."""
    csv = folder / 'train.csv'
    if not csv.is_file():
        notes.append('playground/train.csv: absent, no playground images')
        return train.head(0)
    table = read_labels(csv)
    is_new, is_known, is_listed = table['Id'] == NEW_WHALE, table['Id'].isin(ids), table['Image'].isin(train['Image'])
    joins = is_known & ~is_listed
    notes.append(f'playground/train.csv: {joins.sum()} images join training; left out {is_new.sum()} of {NEW_WHALE}, '
                 f'{(~is_known & ~is_new).sum()} of ids that train.csv does not have, '
                 f'{(is_known & is_listed).sum()} that train.csv lists already')
    table = table[joins].assign(source='playground')
    _find_images(table, folder / 'train', csv, check_files and joins.any(), [])
    return table


def _read_test(data_dir, check_files, notes):
    """Test images in the order of sample_submission.csv; an empty table, and a note, where there are none."""
    csv, folder = data_dir / 'sample_submission.csv', data_dir / 'test'
    absent = [path.name for path in (csv, folder) if not path.exists() and (check_files or path == csv)]
    if absent:
        notes.append(f'{" and ".join(absent)}: absent, no test images')
        return pd.DataFrame({'Image': [], 'path': []}, dtype=str)
    test = read_labels(csv, ['Image']).reset_index(drop=True)
    _find_images(test, folder, csv, check_files, notes)
    return test


def _add_boxes(train, test, csv, notes):
    """Add x0, y0, x1, y1 as float64, NaN where bboxes.csv has no row for the image."""
    boxes = pd.DataFrame(columns=BOX, dtype='float64')
    if csv.is_file():
        table = read_csv(csv, ['Image', *BOX])
        _refuse(csv, table, table['Image'].duplicated(keep=False), 'lists an image more than once', 'keep one box each')
        boxes = table[BOX].apply(pd.to_numeric, errors='coerce').astype('float64')
        _refuse(csv, table, ~np.isfinite(boxes).all(axis=1), 'has boxes that are not four numbers', 'mend or delete them')
        _refuse(csv, table, (boxes['x1'] <= boxes['x0']) | (boxes['y1'] <= boxes['y0']), 'has boxes without an area',
                'x1 must exceed x0, and y1 must exceed y0')
        boxes.index = table['Image']
    for frame in (train, test):
        frame[BOX] = boxes.reindex(frame['Image']).to_numpy()
    known = [f'{frame["x0"].notna().sum()} of {len(frame)}' for frame in (train, test)]
    notes.append(f'bboxes.csv: boxes of {known[0]} training and {known[1]} test images' if csv.is_file() else
                 'bboxes.csv: absent, each box is the whole image')


def _add_masks(train, test, data_dir, notes):
    """Add mask_path, from masks/NAME.png or .jpg, and mask_rle, from masks.csv for images without such a file."""
    folder, csv = data_dir / 'masks', data_dir / 'masks.csv'
    files = sorted(os.listdir(folder)) if folder.is_dir() else []
    # .png comes after .jpg, and so wins where an image has both
    files = {name.rpartition('.')[0]: str(folder / name) for name in files if name.endswith(('.jpg', '.png'))}
    rles = {}
    if csv.is_file():
        table = read_csv(csv, ['id', 'rle_mask'])
        _refuse(csv, table, table['id'].duplicated(keep=False), 'lists an image more than once', 'keep one mask each')
        _refuse(csv, table, ~table['rle_mask'].str.fullmatch(r'\s*(\d+\s+\d+\s*)*'), 'has masks that are not pairs of '
                'numbers', 'write start and length of each run of the mask')
        rles = dict(zip(table['id'], table['rle_mask']))
    for frame in (train, test):
        stems = frame['Image'].str.replace(r'\.[^.]*$', '', regex=True)
        frame['mask_path'] = pd.Series([files.get(stem) for stem in stems], index=frame.index, dtype=object)
        found = [None if path else rles.get(name, rles.get(stem))
                 for path, name, stem in zip(frame['mask_path'], frame['Image'], stems)]
        frame['mask_rle'] = pd.Series(found, index=frame.index, dtype=object)
    known = [f'{frame[["mask_path", "mask_rle"]].notna().any(axis=1).sum()} of {len(frame)}' for frame in (train, test)]
    notes.append(f'masks: of {known[0]} training and {known[1]} test images' if folder.is_dir() or csv.is_file() else
                 'masks/ and masks.csv: absent, each mask is zeros')


def _read_groups(csv, ids, notes):
    """(N,) int64, equal for ids that are one whale. All names in a row are one whale; a group's own name may be among."""
    if not csv.is_file():
        notes.append('duplicate_ids.csv: absent, each id is a whale of its own')
        return None
    parent = {name: name for name in ids}

    def root(name):
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row in read_csv(csv, ['Id', 'SubId']).to_numpy():
        names = [name for name in ' '.join(row).split() if name != NEW_WHALE]
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    group = np.unique([root(name) for name in ids], return_inverse=True)[1].astype('int64')
    notes.append(f'duplicate_ids.csv: {len(ids) - len(set(group))} ids are another id\'s whale')
    return group
