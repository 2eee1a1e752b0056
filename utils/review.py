"""matches.html: each query beside its five answers, for a person to decide; its thumbnails lie in matches/ beside it."""
import base64
import hashlib
import json
import re
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from data.tables import read_csv
from utils.files import write_whole
from utils.log import progress_bar

TEMPLATE = Path(__file__).with_suffix('.html')
WIDTH = 400  # of a thumbnail, pixels, at most


def write_review(path, member, images, scores, order, is_new, threshold):
    """The page at `path`: it needs no server, and loads nothing but its thumbnails.

    member: a Member that has scored the Q photographs `images`. scores, order (Q, 5): the five best ids of each; is_new (Q,):
    new_whale stands above them. What reviewed.csv says already is decided from the start.
    """
    folder, train = path.with_suffix(''), member.train
    places = nearest_photographs(member, order)  # (Q, 5) in the gallery, -1: none
    used = np.unique(places[places >= 0])  # (P,) the photographs
    shown = np.where(places < 0, -1, np.searchsorted(used, places))  # (Q, 5) which of them
    reviewed = Path(member.c.data_dir) / 'reviewed.csv'
    # decisions are of the photographs, whatever network answers; elsewhere the same file name may be another photograph
    key = f'{Path(member.c.data_dir).resolve()} {path.parent.name}'
    data = dict(
        run=path.parent.name, key=hashlib.sha256(key.encode()).hexdigest(), threshold=threshold, ids=member.all_ids,
        aspect=member.test.width / member.test.height, photographs=member.images[used].tolist(),
        reviewed=read_csv(reviewed, ['Image', 'Id']).to_numpy().tolist() if reviewed.is_file() else [],
        queries=list(zip(images, is_new.tolist(), order.tolist(), scores.double().round(decimals=4).tolist(), shown.tolist())))
    # Named by what they show: a page that is still open in a browser never gets another run's photograph.
    stamp = hashlib.sha256(f'{json.dumps(data)} {member.test.key} {member.labelled.key}'.encode()).hexdigest()
    data['stamp'] = int(stamp[:12], 16)
    rows = pd.Index(train['Image']).get_indexer(member.images[used])
    write_thumbnails(folder, data['stamp'], [(member.test, np.arange(len(images))), (member.labelled, rows)])
    write_whole(path, lambda temporary: Path(temporary).write_text(fill(TEMPLATE.read_text('utf-8'), data), 'utf-8'))
    for old in folder.glob('*.jpg'):
        if not old.name.startswith(f'{data["stamp"]}_'):
            old.unlink()


def nearest_photographs(member, order):
    """Of each test image the photograph of each of its ids `order` (Q, 5) that is most like it: (Q, 5), as `nearest_of`."""
    blocks = [slice(first, first + 64) for first in range(0, len(order), 64)]
    rows = np.arange(len(order))
    return torch.cat([member.gallery.nearest_of(order[block].to(member.c.device), member.likeness(rows[block])).cpu()
                      for block in blocks]).numpy()


def write_thumbnails(folder, stamp, parts):
    """The crops' `rows` as STAMP_0.jpg, STAMP_1.jpg, ..., for each (crops, rows) of `parts` in turn."""
    folder.mkdir(exist_ok=True)
    number = count()
    with progress_bar(total=sum(len(rows) for _, rows in parts), desc='thumbnails', unit='img') as bar:
        for crops, rows in parts:
            for first in range(0, len(rows), 64):
                for crop in crops[rows[first:first + 64]][0].cpu().numpy():  # (h, w, 3)
                    scale = min(1, WIDTH / crop.shape[1])
                    small = cv2.resize(crop, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                    jpeg = cv2.imencode('.jpg', small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
                    (folder / f'{stamp}_{next(number)}.jpg').write_bytes(jpeg)
                    bar.update()


def fill(template, data):
    """The page: `data` as JSON in which nothing can end its <script>, and a policy that runs the template's script only."""
    style, script = (re.search(f'<{tag}>(.*)</{tag}>', template, re.S)[1] for tag in ('style', 'script'))
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; img-src 'self' file:"
    for name, text in ('style', style), ('script', script):
        policy += f"; {name}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    page = template.replace('{{policy}}', policy)
    return page.replace('{{data}}', json.dumps(data, separators=(',', ':')).replace('<', '\\u003c'))
