"""Everything that a training reads, built once before any step: tables, the fold, crops, labels."""
import hashlib
import os

import numpy as np
import torch

from data.decode import check_images
from data.duplicates import fingerprints, twins
from data.images import Crops
from data.tables import NEW_WHALE, load_tables, training_rows, validation_fold
from utils.errors import UserError
from utils.files import sweep, write_whole


class TrainingSet:
    """`c` holds train.py's constants; `min_num_classes` those of all steps to come, each of which must have images."""

    def __init__(self, c, min_num_classes):
        tables = load_tables(c.data_dir, c.flip_is_new_id, pseudo=c.pseudo_label_weight > 0)
        self.tables = check_images(tables, c.skip_bad_images)
        train = self.tables.train.sort_values('Image', ignore_index=True)  # the CSV's order changes nothing
        self.train, self.ids, self.num_ids = train, self.tables.ids, self.tables.num_ids
        self.classes = self.num_ids * (2 if c.flip_is_new_id else 1)
        self.labels = torch.from_numpy(train['label'].to_numpy().copy())  # (n,)
        self.crops = Crops(train, c.height, c.width, c.cache_dir, cache=c.cache, device=c.device)
        readable = self.crops.readable(c.skip_bad_images)
        fold = validation_fold(train, c.fold)  # (n,) bool
        self.valid = fold & readable
        is_pseudo = (train['source'] == 'pseudo').to_numpy()
        seen = self._twins_of(fold)  # what validates must not be learned under another name
        self.rows = {number: training_rows(train, fold, number) & readable & ~seen for number in min_num_classes}
        self.weight = torch.from_numpy(np.where(is_pseudo, c.pseudo_label_weight, 1.0)).float()  # (n,) how much each teaches
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
                      f'fold {c.fold}: {named.sum()} ids + {(~named).sum()} {NEW_WHALE}', *self.tables.notes, str(self.crops)]
        if seen.any():
            names = ', '.join(train['Image'][seen].head(5))
            self.notes.append(f'{seen.sum()} images left out of training that show a photograph of the fold: {names}')

    def _twins_of(self, fold):
        """Which rows outside the fold (n,) bool show a photograph of it: (n,) bool; notes test images that are in training."""
        marks = self._fingerprints('train', self.train['path'])  # (n, 1024)
        asked = self.tables.test[~self.tables.test['Image'].isin(self.train['Image'])]  # not those named since
        copies = asked['Image'][twins(marks, self._fingerprints('test', asked['path'])) >= 0]
        if len(copies):
            self.tables.notes.append(f'{len(copies)} test images show a photograph of train.csv: {", ".join(copies.head(5))}')
        return (twins(marks[fold], marks) >= 0) & ~fold

    def _fingerprints(self, what, paths):
        """Of the photographs, kept beside the crops under a name that changes with them: (n, 1024)."""
        stats = [(path, (now := os.stat(path)).st_size, now.st_mtime_ns) for path in paths]
        file = self.crops.folder / f'{what}_{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.npy'
        if file.exists():
            return np.load(file)
        marks = fingerprints(paths)
        if file.parent.exists():
            sweep(file.parent)
            for old in file.parent.glob(f'{what}_*.npy'):
                old.unlink(missing_ok=True)
            write_whole(file, lambda path: np.save(path, marks))
        return marks

    def batch(self, pairs, pin=False):
        """(row, flip) pairs (B, 2) -> raw crops, masks, labels, flips, weights, in memory that a GPU reads while it computes."""
        rows, flips = np.ascontiguousarray(pairs.T)
        parts = *self.crops[rows], self.labels[rows], torch.from_numpy(flips), self.weight[rows]
        return [part.pin_memory() if pin and part.device.type == 'cpu' else part for part in parts]
