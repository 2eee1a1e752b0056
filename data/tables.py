"""Kaggle's CSVs -> one checked pair of tables (training, test), the label space and the validation folds.

Labels: 0..N-1 are the ids in sorted order, N..2N-1 the same ids mirrored, the next number marks new_whale.
All but train.csv and train/ is optional; `Tables.notes` says what is absent.
"""
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

NEW_WHALE = 'new_whale'
BOX = ['x0', 'y0', 'x1', 'y1']
ODD = re.compile(r'[\0-\x1f\x7f-\x9f\ud800-\udfff]|.{256}')  # in names: numpy and CSV files would lose or refuse some
MAX_FOLD_IDS = 512        # ids in a validation fold: 512 and 230 new_whale on Kaggle
NEW_PER_NAMED = 31 / 69   # new_whale images for each named one in a fold, about as in Kaggle's test set


@dataclass
class Tables:
    """What the files of one `data_dir` say.

    ids: the N names in sorted order. group: (N,) int64, equal for ids of one whale; None: unknown.
    train: a row an image: Image, Id, label (int64), path, x0, y0, x1, y1 (pixels; NaN: no box), mask_path and
        mask_rle (str or None), source ('train', 'playground', 'reviewed' or 'pseudo').
    test: the same without Id, label and source; may be empty. notes: a line for each optional part.
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


def load_tables(data_dir, flip_is_new_id=True, check_files=True, pseudo=False):
    """Read and check the tables under `data_dir`; a UserError names the file, the lines and what to do.

    new_whale's label is 2N, or N where a mirrored animal is the same animal (`flip_is_new_id` False).
    With `check_files` False the images listed need not exist. The images of reviewed.csv, and with `pseudo` those of
    pseudo_labels.csv, join the training table, from test/ and playground/train/; of two labels of an image the first
    counts: train.csv, playground/train.csv, reviewed.csv, pseudo_labels.csv.
    """
    data_dir, csv = Path(data_dir), Path(data_dir) / 'train.csv'
    notes: list[str] = []
    if not csv.is_file():
        raise UserError(f'data_dir = {data_dir} holds no train.csv: unpack '
                        'https://www.kaggle.com/c/humpback-whale-identification/data so that train.csv and '
                        'train/ lie in it, or draw the sample with `python -m data.make_sample`')
    train = read_labels(csv).assign(source='train')
    ids = sorted(set(train['Id']) - {NEW_WHALE})
    if not ids:
        raise UserError(f'{csv} names no id but {NEW_WHALE}: label some images with their ids')
    _find_images(train, data_dir / 'train', csv, check_files, notes)
    playground = _read_playground(data_dir / 'playground', ids, train, check_files, notes)
    train = pd.concat([train, playground], ignore_index=True)
    reviewed, pseudo_csv = data_dir / 'reviewed.csv', data_dir / 'pseudo_labels.csv'
    if reviewed.is_file():
        train = pd.concat([train, _read_answered(reviewed, 'reviewed', train, notes)], ignore_index=True)
        ids = sorted(set(train['Id']) - {NEW_WHALE})  # a person may have named a new animal
    else:
        notes.append('reviewed.csv: absent, no reviewed images')
    if pseudo and not pseudo_csv.is_file():
        raise UserError(f'{pseudo_csv} is not there: write it with test.py (pseudo_label_min_score), or set '
                        'pseudo_label_weight = 0')
    if pseudo:
        train = pd.concat([train, _read_answered(pseudo_csv, 'pseudo', train, notes, ids)], ignore_index=True)
    label = train['Id'].map(dict(zip(ids, range(len(ids)))))
    train['label'] = label.fillna((2 if flip_is_new_id else 1) * len(ids)).astype('int64')
    test = _read_test(data_dir, check_files, notes, train['Image'][train['source'] == 'train'])
    add_boxes_and_masks((train, test), data_dir, notes)
    group = _read_groups(data_dir / 'duplicate_ids.csv', ids, notes)
    columns = ['path', *BOX, 'mask_path', 'mask_rle']
    train, test = train[['Image', 'Id', 'label', *columns, 'source']], test[['Image', *columns]]
    return Tables(data_dir, ids, train, test, group, notes)


def unlabelled_playground(tables):
    """The playground's images that have no label of `tables.ids`: as `tables.test`, to be given one."""
    folder = tables.data_dir / 'playground' / 'train'
    names = [name for name in list_files(folder) if not (name.startswith('.') or ODD.search(name))]
    frame = pd.DataFrame({'Image': names}, dtype=str)
    frame = frame[~frame['Image'].isin([*tables.train['Image'], *tables.test['Image']])].reset_index(drop=True)
    frame['path'] = str(folder) + os.sep + frame['Image']
    add_boxes_and_masks((frame,), tables.data_dir, [])
    return frame.assign(bad=False)


def list_files(folder):
    """Names of the files in a folder, sorted; not of pipes and devices, which would keep their reader waiting."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else []


def list_photographs(folder):
    """Of a folder of folders, each named as an id: a frame of Image (the path in `folder`: ID/NAME), Id, path."""
    found = [path.relative_to(folder) for path in sorted(folder.glob('*/**/*')) if path.is_file()]
    found = [path for path in found if not any(part.startswith('.') for part in path.parts)]
    if not found:
        raise UserError(f'{folder} holds no folders with photographs: make one for each id, named as the id')
    return pd.DataFrame({'Image': [path.as_posix() for path in found], 'Id': [path.parts[0] for path in found],
                         'path': [str(folder / path) for path in found]})


def read_photographs(source):
    """Named photographs elsewhere: in a folder of folders, each named as an id, or listed in a CSV (Image,Id) beside them.

    A frame of Image (in a folder of folders: ID/NAME), Id, path, and the boxes and masks that lie beside them.
    """
    source = Path(source)
    if source.is_dir():
        table = list_photographs(source)
        refuse_names(source, table)
    elif source.is_file():
        table = read_labels(source)
        _find_images(table, source.parent, source, True, [])
    else:
        raise UserError(f'{source} is not there: name a folder of folders, or a CSV with the columns Image and Id')
    nobody = table['Id'].str.lower().isin([NEW_WHALE, 'unknown'])
    refuse(source, table, nobody, 'has photographs of animals without a name', 'leave them out, or give each animal a name')
    table = table.reset_index(drop=True)
    add_boxes_and_masks((table,), source if source.is_dir() else source.parent, [])
    return table


def validation_fold(train, fold, seed=0):
    """Rows of `train` that validate: boolean (rows,). `fold` 0..4 are independent draws, which may overlap.

    A third of the ids with two images or more, at most 512, give one image each; new_whale images join until
    they are 31% of the fold, or half of them are in it. Playground images and an id's only image are left in
    training. The draw depends on the images' names and the order of the ids, not on the order of the rows.
    """
    rng = np.random.default_rng([seed, fold])
    rows = np.flatnonzero(train['source'] == 'train')
    rows = rows[np.argsort(train['Image'].to_numpy(str)[rows])]
    is_new = (train['Id'] == NEW_WHALE).to_numpy()[rows]
    named, new = rng.permutation(rows[~is_new]), rows[is_new]
    labels = train['label'].iloc[named]
    repeated = np.unique(labels[labels.duplicated()])
    num_ids = min(MAX_FOLD_IDS, len(repeated) // 3)
    if num_ids == 0:
        raise UserError(f'train.csv has {len(repeated)} ids with two images or more; validation needs three')
    chosen = labels.isin(rng.choice(repeated, num_ids, replace=False)) & ~labels.duplicated()
    num_new = min(round(NEW_PER_NAMED * num_ids), len(new) // 2)
    valid = np.zeros(len(train), bool)
    valid[named[chosen]] = True
    valid[rng.choice(new, num_new, replace=False)] = True
    return valid


def training_rows(train, valid, min_num_class):
    """Rows outside `valid` to learn from: new_whale, and ids with `min_num_class` images there (0: all)."""
    is_new = (train['Id'] == NEW_WHALE).to_numpy()
    named = ~is_new & ~valid
    count = train['Id'].map(train['Id'][named].value_counts()).fillna(0).to_numpy()
    keep = named & (count >= min_num_class)
    if not keep.any():
        raise UserError(f'no id has min_num_class = {min_num_class} images outside validation; '
                        f'the largest has {int(count.max(initial=0))}: lower min_num_class (stages = "all": in schedule)')
    return keep | (is_new & ~valid)


def read_csv(path, columns=None, unique=True):
    """`columns` (None: all) of a CSV as text, without blank lines; the index counts the file's lines from 1.

    UserError if it is no such CSV, or names an image (the first column) twice where it must be `unique`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', pd.errors.ParserWarning)  # each row is longer than the first line
            table = pd.read_csv(path, dtype=str, na_filter=False, skip_blank_lines=False, index_col=False, compression=None)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:  # pandas' own errors are ValueErrors
        reason = getattr(error, 'strerror', None) or str(error).strip()
        raise UserError(f'{path} cannot be read as a CSV file ({reason}): save it there as UTF-8 CSV') from error
    columns = table.columns if columns is None else columns
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f'{path} has no column {" and ".join(missing)} but {",".join(table.columns)[:80]!r}: '
                        f'its first line must be {",".join(columns)}, with commas')
    table.index += 2
    table = table.loc[(table != '').any(axis=1), list(columns)]
    repeated = table[columns[0]].duplicated(keep=False) & unique
    refuse(path, table, repeated, 'lists an image more than once', 'keep one row for each')
    return table


def read_labels(path, columns=('Image', 'Id'), undecided=False):
    """Image names, and ids where `columns` has them: nothing blank, no image twice, no id with a space.

    With `undecided` an id may be blank, and its row is left out.
    """
    table = read_csv(path, columns)
    if table.empty and not undecided:
        raise UserError(f'{path} has no rows: it needs one line for each image')
    if undecided:
        table = table[table['Id'].str.strip() != '']
    blank = table.apply(lambda column: column.str.strip() == '').any(axis=1)
    refuse(path, table, blank, 'has rows without an image or an id', f'fill in ({NEW_WHALE} if unknown)')
    is_path = table['Image'].str.contains(r'[/\\]') | table['Image'].isin(['.', '..'])
    refuse(path, table, is_path, 'has image names that are paths', 'write bare names of files in the folder')
    refuse_names(path, table)
    return table


def refuse_names(path, table):
    odd = table.map(lambda text: ODD.search(text) is not None).any(axis=1)
    refuse(path, table, odd, 'has names with control characters, or of 256 characters and more', 'rename them')
    if 'Id' in table:
        refuse(path, table, table['Id'].str.contains(r'\s'), 'has ids with a space in them',
                'write _ in its place, since a submission separates ids by spaces')


def refuse(path, table, bad, what, remedy):
    """UserError that shows the first rows where `bad` is true, by line number."""
    if bad.any():
        shown = [f'line {row[0]}: {",".join(row[1:])[:60]}' for row in table[bad].head(5).itertuples()]
        raise UserError(f'{path} {what} ({"; ".join(shown)}{"; ..." if bad.sum() > 5 else ""}): {remedy}')


def _find_images(table, folder, csv, check_files, notes):
    """Add `path`; UserError when images of the table are not in the folder."""
    table['path'] = str(folder) + os.sep + table['Image']
    if not check_files:
        return
    if not folder.is_dir():
        raise UserError(f'{folder} is not there, yet {csv} lists its images: unpack the images into it')
    present = set(list_files(folder))
    missing = table['Image'][~table['Image'].isin(present)]
    if len(missing):
        raise UserError(f'{len(missing)} of the {len(table)} images that {csv} lists are not in {folder} '
                        f'({", ".join(missing[:5])}{" ..." if len(missing) > 5 else ""}): unpack them right '
                        'there, or delete their rows')
    unlisted = sorted(name for name in present.difference(table['Image']) if not name.startswith('.'))
    if unlisted:
        notes.append(f'{folder.name}/: {len(unlisted)} files, {unlisted[0]!r} the first, are not in {csv.name}')


def _read_playground(folder, ids, train, check_files, notes):
    """Rows of the earlier contest that can join `train`: of an id of `ids`, and not in `train` by name."""
    csv = folder / 'train.csv'
    if not csv.is_file():
        notes.append('playground/train.csv: absent, no playground images')
        return train.head(0)
    table = read_labels(csv).assign(source='playground')
    is_new, is_known = table['Id'] == NEW_WHALE, table['Id'].isin(ids)
    is_listed = table['Image'].isin(train['Image'])
    notes.append(f'playground/train.csv: {(is_known & ~is_listed).sum()} images join training; left out '
                 f'{is_new.sum()} of {NEW_WHALE}, {(~is_known & ~is_new).sum()} of ids not in train.csv, '
                 f'{(is_known & is_listed).sum()} that train.csv lists already')
    table = table[is_known & ~is_listed].copy()
    _find_images(table, folder / 'train', csv, check_files and len(table) > 0, [])
    return table


def _read_answered(csv, source, train, notes, ids=None):
    """Rows of pseudo_labels.csv or reviewed.csv: images of test/ and playground/train/ as a network, or a person, named them.

    A person may give any name (`ids` None), or none to what stays undecided; such rows are left out.
    """
    table = read_labels(csv, undecided=ids is None).assign(source=source)
    if ids is not None:
        refuse(csv, table, ~table['Id'].isin([*ids, NEW_WHALE]), 'has ids that train.csv has not', 'write the file anew')
    listed = table['Image'].isin(train['Image'])
    table = table[~listed].copy()
    folders = [csv.parent / 'test', csv.parent / 'playground' / 'train']
    table['path'] = [next((path for path in (f'{folder}{os.sep}{name}' for folder in folders) if os.path.isfile(path)), '')
                     for name in table['Image']]
    refuse(csv, table, table['path'] == '', 'has images that are neither in test/ nor in playground/train/',
            'write it anew' if ids is not None else 'put them back, or delete their rows')
    fresh = sorted(set(table['Id']).difference(train['Id'], [NEW_WHALE]))
    notes.append(f'{csv.name}: {(table["Id"] != NEW_WHALE).sum()} images of ids and {(table["Id"] == NEW_WHALE).sum()} '
                 f'of {NEW_WHALE} join training; {listed.sum()} left out that have a label already'
                 + (f'; names that are new: {", ".join(fresh[:10])}' if fresh else ''))
    return table


def _read_test(data_dir, check_files, notes, named):
    """Test images in the order of sample_submission.csv; an empty table, and a note, where there are none."""
    csv, folder = data_dir / 'sample_submission.csv', data_dir / 'test'
    if not csv.is_file() or check_files and not folder.is_dir():
        notes.append(f'{folder.name if csv.is_file() else csv.name}: absent, no test images')
        return pd.DataFrame({'Image': [], 'path': []}, dtype=str)
    test = read_labels(csv, ['Image'])
    refuse(csv, test, test['Image'].isin(named), 'names photographs as train.csv does', 'rename them')
    test = test.reset_index(drop=True)
    _find_images(test, folder, csv, check_files, notes)
    return test


def add_boxes_and_masks(frames, folder, notes):
    """What `folder` has of bboxes.csv, masks/ and masks.csv, by the frames' image names."""
    add_boxes(frames, folder / 'bboxes.csv', notes)
    add_masks(frames, folder / 'masks', folder / 'masks.csv', notes)


def add_boxes(frames, csv, notes):
    """Add x0, y0, x1, y1 as float64, NaN where bboxes.csv has no row for the image."""
    boxes = pd.DataFrame(columns=BOX, dtype='float64')
    if csv.is_file():
        table = read_csv(csv, ['Image', *BOX])
        boxes = table[BOX].apply(pd.to_numeric, errors='coerce').astype('float64')
        sides = boxes[['x1', 'y1']].to_numpy() - boxes[['x0', 'y0']].to_numpy()  # (rows, 2)
        is_box = (boxes.abs() < 1e9).all(axis=1) & (sides > 1e-3).all(axis=1)  # numbers that can still be computed with
        refuse(csv, table, ~is_box, 'has boxes without x0 < x1 and y0 < y1 in pixels', 'mend or delete them')
        boxes.index = table['Image']
    found = []
    for frame in frames:
        frame[BOX] = boxes.reindex(frame['Image']).to_numpy()
        found.append(f'{frame["x0"].notna().sum()} of {len(frame)}')
    notes.append(f'bboxes.csv: boxes of {" training and ".join(found)} test images' if csv.is_file()
                 else 'bboxes.csv: absent, each box is the whole image')


def add_masks(frames, folder, csv, notes):
    """Add mask_path, of masks/NAME.png or .jpg, and mask_rle, of masks.csv where there is no such file."""
    names = sorted(list_files(folder), key=lambda name: name.lower().endswith('.png'))  # last, so that they win
    files = {Path(name).stem: str(folder / name) for name in names if name.lower().endswith(('.jpg', '.jpeg', '.png'))}
    rles = {}
    if csv.is_file():
        table = read_csv(csv, ['id', 'rle_mask'])
        no_mask = ~table['rle_mask'].str.fullmatch(r'\s*(\d+\s+\d+(\s+|$))*')
        refuse(csv, table, no_mask, 'has masks that are not pairs of numbers', 'write start length ...')
        rles = dict(zip(table['id'], table['rle_mask']))
    found = []
    for frame in frames:
        stems = frame['Image'].str.replace(r'\.[^.]*$', '', regex=True)
        paths = [files.get(stem) for stem in stems]
        runs = [None if path else rles.get(image, rles.get(stem))
                for path, image, stem in zip(paths, frame['Image'], stems)]
        frame['mask_path'] = pd.Series(paths, frame.index, dtype=object)
        frame['mask_rle'] = pd.Series(runs, frame.index, dtype=object)
        found.append(f'{(frame["mask_path"].notna() | frame["mask_rle"].notna()).sum()} of {len(frame)}')
    notes.append(f'masks: of {" training and ".join(found)} test images' if files or rles
                 else 'masks/ and masks.csv: absent, each mask is zeros')


def _read_groups(csv, ids, notes):
    """(N,) int64, equal for ids of one whale: all names in a row are, be one the name of the group."""
    if not csv.is_file():
        notes.append('duplicate_ids.csv: absent, each id is a whale of its own')
        return None
    parent: dict[str, str] = {}

    def root(name):
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]  # a shorter way for the next who asks
        return name

    for row in read_csv(csv, ['Id', 'SubId'], unique=False).to_numpy():
        names = [name for name in ' '.join(row).split() if name != NEW_WHALE]
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    group = np.unique([root(name) for name in ids], return_inverse=True)[1].astype('int64')
    notes.append(f'duplicate_ids.csv: {len(ids) - len(np.unique(group))} ids are another name of a whale')
    return group
