"""One trained network as it answers: scores of validation and test images, with those of its gallery mixed in."""
import hashlib
import os
import tempfile
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from data.images import Crops
from data.tables import NEW_WHALE
from models.backbone import fold_batch_norms
from models.whale_net import whale_net
from utils import checkpoint
from utils.device import amp_dtype
from utils.errors import UserError, raise_if_machines
from utils.files import sha256, write_whole
from utils.metrics import choose_threshold
from utils.scores import Gallery, calibrate, fuse, predict, predict_batches

VIEWS = (1.0, 0.93, 1.07)  # scales


# Arrays of the files: name -> kind of dtype, and its dimensions by letter.
GALLERY = dict(embeddings=('f', 'g2c'), images=('U', 'g'), owners=('U', 'g'), enrolled=('b', 'g'), key=('U', ''))
SCORES = dict(ids=('U', 'n'), images=('U', 'q'), scores=('f', 'qn'), valid_images=('U', 'v'), valid=('f', 'vn'))


def on_disk(folder, shape, dtype):
    """An array in a nameless file: a score for each image and id may be more than memory holds."""
    with tempfile.TemporaryFile(dir=folder) as file:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size and hasattr(os, 'posix_fallocate'):  # the room is taken now: a disk that is full later ends it without a word
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, 'w+', shape=shape)


@dataclass
class Scores:
    """What an ensemble needs of a member. table (Q, N), a row of -1 for an image that cannot be read;
    valid (V, N) float32: of the labelled images that the training left out, `valid_images`."""
    name: str
    ids: list
    images: list
    table: np.ndarray
    valid_images: list
    valid: torch.Tensor


def load_arrays(path, layout, remedy):
    """The arrays of an npz, by name. UserError, which ends in `remedy`, when they cannot be read or are not as in `layout`."""
    try:
        checkpoint.require_stored(path)
        with np.load(path) as file:
            arrays, sizes = {name: file[name] for name in layout}, {'2': 2}
        for name, (kind, letters) in layout.items():
            array = arrays[name]
            if array.dtype.kind != kind or array.ndim != len(letters) or any(
                    sizes.setdefault(letter, size) != size for letter, size in zip(letters, array.shape)) or \
                    kind == 'f' and not np.isfinite([array.min(initial=0), array.max(initial=0)]).all() or \
                    name.endswith(('ids', 'images')) and len(np.unique(array)) < len(array):
                raise ValueError(f'its {name} are not such as test.py writes')
        return arrays
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        # numpy's MemoryError has the array's shape: a file that claims more than it holds is not the machine's fault
        if not hasattr(error, 'shape') or np.prod(error.shape, dtype=float) <= os.path.getsize(path):
            raise_if_machines(error)
        raise UserError(f'{path} cannot be read ({error}): {remedy}') from error


def saved_scores(path):
    """The Scores in a scores.npz that test.py wrote."""
    file = load_arrays(path, SCORES, 'run test.py for that training again')
    return Scores(str(path), file['ids'].tolist(), file['images'].tolist(), file['scores'], file['valid_images'].tolist(),
                  torch.from_numpy(file['valid'].astype(np.float32)))


class Member:
    """A checkpoint: its network, and its gallery: the labelled photographs of the table `train`, and enrolled ones.

    `ids`: the N names that it was trained on. `crops`: where crops of one size are shared by members.
    """

    def __init__(self, c, file, train, ids, crops):
        state = checkpoint.load(file)
        if state['ids'] != ids:
            odd = [*sorted(set(state['ids']) ^ set(ids)), 'their order']
            raise UserError(f'{file} was trained on other ids than {c.data_dir} has in train.csv and reviewed.csv ({len(odd) - 1}'
                            f' differ, such as {odd[0]}): its answers would be wrong; use the data folder that it was trained on')
        self.c, self.file, self.name = c, file, f'{file.parent.name}/{file.stem}'
        self.train, self.ids, self.shared = train, ids, crops
        self.made, self.fold_images = state['constants'], state['fold_images']
        self.size = self.made['height'], self.made['width']
        self.labelled = self.crops_of(train)
        self.net = whale_net(self.made, len(ids) * (2 if self.made['flip_is_new_id'] else 1))
        checkpoint.fill(self.net, state, file)
        self.net.to(c.device, memory_format=torch.channels_last)
        fold_batch_norms(self.net.backbone)
        self.settings = (*self.size, len(ids), self.made['flip_is_new_id'], c.batch_size, c.device,
                         amp_dtype(c.precision, c.device), VIEWS[:c.views])
        self._load_gallery()

    def crops_of(self, frame):
        """Of a table that lives as long as `crops`."""
        key = id(frame), self.size
        if key not in self.shared:  # one size for most ensembles
            self.shared[key] = self._crops(frame)
        return self.shared[key]

    def _crops(self, frame):
        device = 'cpu' if self.c.cache == 'auto' else self.c.device  # each crop is asked for about once: the disk is as good
        return Crops(frame, *self.size, self.c.cache_dir, cache=self.c.cache, device=device)

    def embed(self, crops, rows, what):
        """(n, 2, C) on the device, scores left out: those of a whole gallery may be more than memory holds."""
        batches = predict_batches(self.net, crops, rows, *self.settings, what=f'{self.name}: {what}')
        return torch.cat([embeddings for _, embeddings in batches])

    def _load_gallery(self):
        """embeddings (G, 2, C), images and owners (G) of the photographs, enrolled (G): those have their file's hash as image."""
        self.gallery_file = self.file.parent / f'gallery_{self.file.stem}.npz'
        self.seen = self._written()
        rows = np.flatnonzero(self.train['Id'].isin(self.ids).to_numpy() & self.labelled.readable(self.c.skip_bad_images))
        self.images, self.owners = (self.train[name].to_numpy(str)[rows] for name in ('Image', 'Id'))
        self.enrolled = np.zeros(len(rows), bool)
        self.network_key = f'{sha256(self.file)} {self.c.views}'
        names = hashlib.sha256(self.train[['Image', 'Id']].to_csv().encode()).hexdigest()
        self.key = f'{self.network_key} {self.labelled.key} {names}'  # the crops' key holds files, boxes and masks
        saved = None
        if self.gallery_file.exists():
            saved = load_arrays(self.gallery_file, GALLERY, 'delete it, then enrol its new ids again')
            if not str(saved['key']).startswith(self.network_key) or saved['embeddings'].shape[2] != self.net.neck.num_features:
                if saved['enrolled'].any():
                    raise UserError(f'{self.gallery_file} was made with other weights or views than {self.file} has now: delete '
                                    'it, then enrol its new ids again')
                saved = None
        if saved and str(saved['key']) == self.key and np.array_equal(saved['owners'][~saved['enrolled']], self.owners):
            self.images, self.owners, self.enrolled = (saved[name] for name in ('images', 'owners', 'enrolled'))
            self.embeddings = torch.from_numpy(saved['embeddings']).float().to(self.c.device)
            return
        self.embeddings = self.embed(self.labelled, rows, 'gallery').half().float()  # as a later call reads them
        if saved:
            new = saved['enrolled']
            self.add(*(saved[name][new] for name in ('images', 'owners')), torch.from_numpy(saved['embeddings'][new]).float())  # type: ignore[call-arg]
        self.save_gallery()

    def add(self, images, owners, embeddings):
        self.embeddings = torch.cat([self.embeddings, embeddings.to(self.c.device).half().float()])
        self.images, self.owners = np.concatenate([self.images, images]), np.concatenate([self.owners, owners])
        self.enrolled = np.concatenate([self.enrolled, np.ones(len(images), bool)])

    def enrol(self, frame):
        """Add photographs under their ids, to be kept by `save_gallery`; the number of those that were not there yet."""
        names, sizes = np.array([sha256(path)[:16] for path in frame['path']]), {os.path.getsize(path) for path in frame['path']}
        own = self.train[self.train['Id'] != NEW_WHALE]
        known = {sha256(path)[:16]: name for path, name in zip(own['path'], own['Id']) if os.path.getsize(path) in sizes}
        known.update(zip(self.images[self.enrolled], self.owners[self.enrolled]))
        fresh = ~np.isin(names, list(known)) & ~pd.Series(names).duplicated().to_numpy()
        for name, image, owner in zip(names, frame['Image'], frame['Id']):
            if known.setdefault(name, owner) != owner:
                raise UserError(f'{image} is a photograph of {known[name]} already, not of {owner}: leave it out; or, if it was '
                                f'enrolled by mistake, delete {self.gallery_file} and enrol the others again')
        frame, names = frame[fresh].reset_index(drop=True), names[fresh]
        if len(frame):
            crops = self._crops(frame)
            rows = np.flatnonzero(crops.readable(self.c.skip_bad_images))
            self.add(names[rows], frame['Id'].to_numpy(str)[rows], self.embed(crops, rows, 'enrolment'))
            return len(rows)
        return 0

    def _written(self):
        return self.gallery_file.stat().st_mtime_ns if self.gallery_file.exists() else None

    def save_gallery(self):
        if self._written() != self.seen:
            raise UserError(f'another test.py wrote {self.gallery_file} meanwhile: run this again')
        arrays = self.embeddings.half().cpu().numpy(), self.images, self.owners, self.enrolled, self.key
        write_whole(self.gallery_file, lambda path: np.savez(path, **dict(zip(GALLERY, arrays))))
        self.seen = self._written()

    @property
    def all_ids(self):
        """The ids that were trained, then those that were only enrolled."""
        return [*self.ids, *sorted(set(self.owners[self.enrolled]) - set(self.ids))]

    def scores(self, asked):
        """Its Scores of the table `asked`; prints what the classifiers, the gallery and both reach on validation."""
        names, device = self.all_ids, self.c.device
        number = dict(zip(names, range(len(names))))
        owners = torch.tensor([number[name] for name in self.owners], device=device)
        valid = self.train['Image'].isin(self.fold_images).to_numpy() & self.labelled.readable(self.c.skip_bad_images)
        rows = np.flatnonzero(valid)
        if self.enrolled.any():  # a photograph of the fold that was enrolled since would find itself
            rows = rows[[sha256(path)[:16] not in self.images[self.enrolled] for path in self.train['path'].iloc[rows]]]
        if not len(rows):
            raise UserError(f'no photograph of the fold is left to validate with: delete {self.gallery_file}, enrol others')
        in_fold = torch.from_numpy(np.isin(self.images, self.fold_images) & ~self.enrolled)
        truth = torch.tensor([number.get(name, len(names)) for name in self.train['Id'].iloc[rows]])
        everything = self.net, self.labelled, rows, *self.settings
        classifier, queries = predict(*everything, what=f'{self.name}: validation')  # (V, N), (V, 2, C)
        # the fold's own images would find themselves
        rest = Gallery(self.embeddings[~in_fold], owners[~in_fold.to(device)], len(names))
        near = rest.scores(queries.to(device)).cpu()
        self.nearest = near, truth
        known = len(self.ids)  # enrolling more leaves the others' scores as they are
        curve = calibrate(near[:, :known], truth.clamp(max=known))
        near = curve(near)
        self.weight = self._choose_weight(classifier, near, truth) if self.c.gallery_weight < 0 else self.c.gallery_weight
        self.gallery = Gallery(self.embeddings, owners, len(names))
        fused = fuse(classifier, near, self.weight)
        reached = [choose_threshold(fuse(classifier, near, weight), truth)[1] for weight in (0.0, 1.0, self.weight)]
        print(f'{self.name}: validation MAP@5 ({len(rows)} images): classifiers {reached[0]:.3f}, gallery {reached[1]:.3f}, '
              f'gallery weight {self.weight:.2f}: {reached[2]:.3f}')
        table, self.test, first = on_disk(self.file.parent, (len(asked), len(names)), np.float32), self.crops_of(asked), 0
        self.queries = on_disk(self.file.parent, (len(asked), *self.embeddings.shape[1:]), np.float16)
        self.itself = pd.Index(self.images).get_indexer(asked['Image'])  # (Q,) in the gallery, if a person has named it; or -1
        everything = self.net, self.test, np.arange(len(asked)), *self.settings
        for classifier, queries in predict_batches(*everything, what=f'{self.name}: test'):
            table[first:first + len(queries)] = fuse(classifier, curve(self.gallery.scores(queries)), self.weight).cpu()
            self.queries[first:first + len(queries)] = queries.cpu()
            first += len(queries)
        table[~self.test.readable(self.c.skip_bad_images) | asked['bad'].to_numpy(bool)] = -1
        return Scores(self.name, names, asked['Image'].tolist(), table, self.train['Image'].iloc[rows].tolist(), fused)

    def likeness(self, rows):
        """Of the test images `rows` (b,) and the gallery: (b, G); -2 where there is no crop to show beside it.

        Those of enrolled photographs are not kept; and no photograph is compared with itself.
        """
        itself = self.itself[rows, None] == np.arange(len(self.enrolled))
        hidden = torch.from_numpy(self.enrolled | itself).to(self.c.device)  # (b, G)
        queries = torch.from_numpy(self.queries[rows]).float().to(self.c.device)  # (b, 2, C)
        return self.gallery.likeness(queries).masked_fill(hidden, -2)

    def _choose_weight(self, classifier, near, truth):
        """The gallery's weight that is best on validation. A small fold is noisy: one whose neighbours are good too."""
        grid, kernel = np.linspace(0, 1, 21), [1, 2, 3, 2, 1]
        values = [choose_threshold(fuse(classifier, near, weight), truth)[1] for weight in grid.tolist()]
        smooth = np.convolve(values, kernel, 'same') / np.convolve(np.ones_like(values), kernel, 'same')
        return grid[smooth.argmax()].item()
