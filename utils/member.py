"""One trained network as it answers: scores of validation and test images, with those of its gallery mixed in."""
import hashlib
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from data.images import Crops
from models.backbone import fold_batch_norms
from models.whale_net import whale_net
from utils import checkpoint
from utils.device import amp_dtype, compile_network
from utils.errors import UserError
from utils.files import write_whole
from utils.log import progress_bar
from utils.metrics import choose_threshold
from utils.scores import Gallery, calibrate, fuse, predict, predict_batches

VIEWS = ((0.0, 0.0, 1.0), (0.0, 0.0, 0.93), (0.0, 0.0, 1.07))  # x, y, scale


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


def saved_scores(path):
    """The Scores in a scores.npz that test.py wrote. UserError when it holds something else."""
    try:
        with np.load(path) as file:
            return Scores(str(path), file['ids'].tolist(), file['images'].tolist(), file['scores'],
                          file['valid_images'].tolist(), torch.from_numpy(file['valid'].astype(np.float32)))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{path} holds no scores of test.py ({error}): run test.py for that training again') from error


def save_scores(path, scores, threshold):
    """Write Scores whole, as float16."""
    write_whole(path, lambda temporary: np.savez(
        temporary, scores=scores.table.astype(np.float16), ids=np.array(scores.ids), images=np.array(scores.images),
        threshold=threshold, valid=scores.valid.numpy().astype(np.float16), valid_images=np.array(scores.valid_images)))


class Member:
    """A checkpoint: its network, the crops that it sees, and its gallery: the labelled photographs, and enrolled ones.

    `train`, `asked`: the tables of labelled and of test images; `ids`: the N names that it was trained on.
    """

    def __init__(self, c, file, train, asked, ids, crops):
        state = checkpoint.load(file)
        if state['ids'] != ids:
            odd = sorted(set(state['ids']) ^ set(ids))
            raise UserError(f'{file} was trained on other ids than {c.data_dir}/train.csv has ({len(odd)} differ, such as '
                            f'{odd[0]}): its answers would be wrong; use the data folder that it was trained on')
        self.c, self.file, self.name = c, file, f'{file.parent.name}/{file.stem}'
        self.train, self.asked, self.ids = train, asked, ids
        self.made, self.fold_images = state['constants'], state['fold_images']
        self.size = self.made['height'], self.made['width']
        for part, frame in enumerate((train, asked)):
            if (part, self.size) not in crops:  # one size for most ensembles
                crops[part, self.size] = self.new_crops(frame)
        self.labelled, self.test = (crops[part, self.size] for part in (0, 1))
        self.net = whale_net(self.made, len(ids) * (2 if self.made['flip_is_new_id'] else 1))
        checkpoint.fill(self.net, state, file)
        self.net.to(c.device, memory_format=torch.channels_last)
        fold_batch_norms(self.net.backbone)
        why_not = compile_network(self.net, c.compile, c.device)
        if why_not:
            print(f'not compiled: {why_not}')
        self.settings = (*self.size, len(ids), self.made['flip_is_new_id'], c.batch_size, c.device,
                         amp_dtype(c.precision, c.device), VIEWS[:c.views])
        self._load_gallery()

    def new_crops(self, frame):
        return Crops(frame, *self.size, self.c.cache_dir, cache=self.c.cache, device=self.c.device)

    def embed(self, crops, rows, what):
        """(n, 2, C) on the device, scores left out: those of a whole gallery may be more than memory holds."""
        batches = predict_batches(self.net, crops, rows, *self.settings)
        bar = progress_bar(batches, total=-(-len(rows) // self.c.batch_size), desc=f'{self.name}: {what}')
        return torch.cat([embeddings for _, embeddings in bar])

    # The gallery: `embeddings` (G, 2, C), `images` and `owners` (G) names of the photographs and of their ids.

    def _load_gallery(self):
        self.gallery_file = self.file.parent / f'gallery_{self.file.stem}.npz'
        with open(self.file, 'rb') as file:
            digest = hashlib.sha256()
            for block in iter(lambda: file.read(2 ** 24), b''):
                digest.update(block)
        rows = np.flatnonzero((self.train['Id'].isin(self.ids)).to_numpy() & self.labelled.readable(self.c.skip_bad_images))
        self.images, self.owners = self.train['Image'].to_numpy(str)[rows], self.train['Id'].to_numpy(str)[rows]
        # of these weights and crops; the key of the crops holds their boxes, masks and files
        self.key = f'{digest.hexdigest()} {self.labelled.key} {self.c.views}'
        saved = {}
        if self.gallery_file.exists():
            try:
                with np.load(self.gallery_file) as file:
                    saved = dict(file)
                saved_key = str(saved['key'])
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f'{self.gallery_file} is no gallery of test.py ({error}): delete it and enrol again') from error
            if saved_key.split()[0] != digest.hexdigest():
                if saved['enrolled'].any():
                    raise UserError(f'{self.gallery_file} was made with other weights than {self.file} has now: delete it, '
                                    'then enrol its new ids again')
                saved = {}
        own = slice(0, len(rows))
        if saved and saved_key == self.key and (saved['images'][own] == self.images).all():
            embeddings = torch.from_numpy(saved['embeddings'][own]).float().to(self.c.device)
        else:
            embeddings = self.embed(self.labelled, rows, 'gallery')
        self.embeddings, self.enrolled = embeddings, np.zeros(len(rows), bool)
        if saved:
            new = saved['enrolled']
            self.add(saved['images'][new], saved['owners'][new], torch.from_numpy(saved['embeddings'][new]).float())
        self.save_gallery()

    def add(self, images, owners, embeddings):
        self.embeddings = torch.cat([self.embeddings, embeddings.to(self.c.device)])
        self.images, self.owners = np.concatenate([self.images, images]), np.concatenate([self.owners, owners])
        self.enrolled = np.concatenate([self.enrolled, np.ones(len(images), bool)])

    def save_gallery(self):
        embeddings = self.embeddings.half().cpu().numpy()
        self.embeddings = self.embeddings.half().float()  # what a later call reads
        write_whole(self.gallery_file, lambda path: np.savez(
            path, embeddings=embeddings, images=self.images, owners=self.owners, enrolled=self.enrolled, key=self.key))

    @property
    def all_ids(self):
        """The ids that were trained, then those that were only enrolled."""
        return [*self.ids, *sorted(set(self.owners[self.enrolled]) - set(self.ids))]

    # Scores

    def scores(self):
        """Its Scores; prints what the classifiers, the gallery and both reach on validation."""
        names, device = self.all_ids, self.c.device
        number = dict(zip(names, range(len(names))))
        owners = torch.tensor([number[name] for name in self.owners], device=device)
        valid = self.train['Image'].isin(self.fold_images).to_numpy() & self.labelled.readable(self.c.skip_bad_images)
        rows, in_fold = np.flatnonzero(valid), torch.from_numpy(np.isin(self.images, self.fold_images) & ~self.enrolled)
        truth = torch.tensor([number.get(name, len(names)) for name in self.train['Id'].iloc[rows]])
        with progress_bar(total=len(rows), desc=f'{self.name}: validation', unit='img') as bar:
            classifier, queries = predict(self.net, self.labelled, rows, *self.settings, progress=bar.update)  # (V, N), (V, 2, C)
        # the fold's own images would find themselves
        rest = Gallery(self.embeddings[~in_fold], owners[~in_fold.to(device)], len(names))
        near = rest.scores(queries.to(device)).cpu()
        known = len(self.ids)  # enrolling more leaves the others' scores as they are
        curve = calibrate(near[:, :known], truth.clamp(max=known))
        near = curve(near)
        self.weight = self._choose_weight(classifier, near, truth) if self.c.gallery_weight < 0 else self.c.gallery_weight
        self.gallery = Gallery(self.embeddings, owners, len(names))
        fused = fuse(classifier, near, self.weight)
        reached = [choose_threshold(fuse(classifier, near, weight), truth)[1] for weight in (0.0, 1.0, self.weight)]
        print(f'{self.name}: validation MAP@5 ({len(rows)} images): classifiers {reached[0]:.3f}, gallery {reached[1]:.3f}, '
              f'gallery weight {self.weight:.2f}: {reached[2]:.3f}')
        self.scratch = tempfile.TemporaryFile(dir=self.file.parent)  # a score for each image and id may be more than memory holds
        table = np.memmap(self.scratch, np.float32, 'w+', shape=(len(self.asked), len(names)))
        batches = predict_batches(self.net, self.test, np.arange(len(self.asked)), *self.settings)
        bar, first = progress_bar(total=len(self.asked), desc=f'{self.name}: test', unit='img'), 0
        with bar:
            for classifier, queries in batches:
                block = slice(first, first + len(queries))
                table[block] = fuse(classifier, curve(self.gallery.scores(queries)), self.weight).cpu()
                bar.update(len(queries))
                first += len(queries)
        table[~self.test.readable(self.c.skip_bad_images) | self.asked['bad'].to_numpy(bool)] = -1
        return Scores(self.name, names, self.asked['Image'].tolist(), table, self.train['Image'].iloc[rows].tolist(), fused)

    def _choose_weight(self, classifier, near, truth):
        """The gallery's weight that is best on validation. A small fold is noisy: one whose neighbours are good too."""
        grid = torch.linspace(0, 1, 21)
        values = torch.tensor([choose_threshold(fuse(classifier, near, weight.item()), truth)[1] for weight in grid])
        smooth = torch.nn.functional.conv1d(torch.stack([values, torch.ones_like(values)])[:, None],
                                            torch.tensor([[[1.0, 2, 3, 2, 1]]]), padding=2)[:, 0]
        return grid[(smooth[0] / smooth[1]).argmax()].item()
