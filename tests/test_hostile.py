"""Broken and hostile input: one sentence or a sound result, no traceback. SOAK=1 (make soak): twenty times as many cases."""
import io
import resource
import time
import zipfile
import zlib
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import test as answer
import train
from data.decode import decode_rle, find_bad_images, read_mask
from data.duplicates import fingerprints
from data.images import Crops
from data.tables import BOX, NEW_WHALE, load_tables, read_photographs, training_rows, unlabelled_playground, validation_fold
from models.finder_net import FlukeFinder
from models.fluke_finder import list_photographs, load_network
from tests.conftest import CASES, SOAK, arguments, together
from utils.constants import read_constants
from utils.errors import UserError
from utils.member import Member
from utils.metrics import score_submission
from utils.steps import plan

pytestmark = [pytest.mark.filterwarnings('ignore::UserWarning:PIL'), pytest.mark.filterwarnings('ignore::UserWarning:torch')]
MEMORY = 2 ** 30  # that the process may grow by, all cases together


def cases(count):
    return settings(max_examples=count * (20 if SOAK else 1))


@contextmanager
def case(what):
    """Either nothing is raised, or a UserError of one line without control characters."""
    CASES.setdefault('memory', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    began, computed = time.perf_counter(), time.process_time()
    try:
        yield
    except UserError as error:
        assert str(error).isprintable()
    CASES['count'] += 1
    CASES['slowest'] = max(CASES['slowest'], (time.perf_counter() - began, time.process_time() - computed, what))
    CASES['grown'] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - CASES['memory'])
    assert CASES['grown'] < MEMORY


# ---- damage ----------------------------------------------------------------------------------------------------------

KINDS = ['flip', 'byte', 'cut', 'drop', 'double', 'number', 'token', 'splice']
NUMBERS = [0, 1, 2, 255, 256, 10_000, 30_000, 65_535, 2 ** 27, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1]
EDIT = st.tuples(st.sampled_from(KINDS), st.integers(0, 2 ** 16 - 1), st.integers(0, 2 ** 32 - 1))
EDITS = st.lists(EDIT, min_size=1, max_size=5)


def damaged(data, edits, tokens=(b'\0' * 8, b'\xff\xd9', b'\xff\xda'), other=b'', head=None):
    """The bytes after a list of (kind, place, value); half of the places lie in the first `head` bytes."""
    data = bytearray(data)
    for kind, place, value in edits:
        length = min(len(data), head) if head and place % 2 else len(data)
        at, some = place * length >> 16, value % 64 + 1
        if kind == 'flip' and at < len(data):
            data[at] ^= 1 << value % 8
        elif kind == 'byte' and at < len(data):
            data[at] = value % 256
        elif kind == 'cut':
            del data[at:]
        elif kind == 'drop':
            del data[at:at + some]
        elif kind == 'double':
            data[at:at] = data[at:at + some] * (value // 64 % 9)
        elif kind == 'number':
            size, order = 2 + value % 2 * 2, ('big', 'little')[value // 2 % 2]
            data[at:at + size] = (NUMBERS[value // 4 % len(NUMBERS)] & (256 ** size - 1)).to_bytes(size, order)
        elif kind == 'token':
            data[at:at] = tokens[value % len(tokens)]
        elif kind == 'splice':
            data[at:] = other[at:]
    return bytes(data)


def restored(path, content):
    """Write `content` for the length of a `with`; what was there comes back."""
    @contextmanager
    def written():
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        try:
            yield
        finally:
            path.unlink() if before is None else path.write_bytes(before)
    return written()


# ---- tables ----------------------------------------------------------------------------------------------------------

TOKENS = [text.encode('utf-8', 'surrogatepass') for text in (
    '"', ',', '\n', '\r', '\0', '\x1b[31m', '..', '../a.jpg', '/etc/passwd', '\\', 'C:\\a.jpg', 'x' * 300, '\ufeff', '\ud800',
    '\u2028', '\u202e', ' ', '\t', "'", 'nan', 'inf', '-1', '1e308', '-1e308', '1e-320', '9' * 40, '0x10', '1,2,3,4,5,6,7',
    NEW_WHALE, 'Image', 'w_0', ';', '=1+1', '\u0661', 'a\nb.jpg', '"a\nb.jpg"')] + [b'\xff\xfe', b'\x80', b'PK\3\4', b'\x1f\x8b']
TABLES = ['train.csv', 'bboxes.csv', 'masks.csv', 'duplicate_ids.csv', 'sample_submission.csv', 'playground/train.csv',
          'pseudo_labels.csv', 'fluke_finder.csv', 'test/animals.csv', 'test_labels.csv']


@pytest.fixture
def tables(photos):
    """A data folder with all that it may hold."""
    table = pd.read_csv(photos / 'train.csv')
    names, tests = table['Image'], sorted(path.name for path in (photos / 'test').iterdir())
    (photos / 'playground/train').mkdir(parents=True)
    for number in range(4):
        (photos / f'playground/train/p{number}.jpg').write_bytes((photos / 'test/t00.jpg').read_bytes())
    write = {
        'bboxes.csv': dict(Image=[*names[:5], tests[0]], x0=1, y0=[0, 1, 2.5, 3, 4, 5], x1=90, y1=40),
        'masks.csv': dict(id=[*names[3:8], tests[1][:-4]], rle_mask=['1 5 30 20', '', '7 3', '100 5000', '1 73728', '1 1']),
        'duplicate_ids.csv': dict(Id=['w_1', 'g', 'w_5'], SubId=['w_2', 'w_3 w_4', 'w_6 w_1']),
        'playground/train.csv': dict(Image=[f'p{n}.jpg' for n in range(3)], Id=['w_0', NEW_WHALE, 'w_9']),
        'pseudo_labels.csv': dict(Image=[*tests[:3], 'p3.jpg'], Id=['w_1', NEW_WHALE, 'w_2', 'w_3'], score=0.9),
        'fluke_finder.csv': dict(Image=names[:3], confidence='0.9', x0=1, y0=0, x1=90, y1=40, mask='crc00000000'),
        'test/animals.csv': dict(Image=tests[:4], Id=['w_a', 'w_a', 'w_b', 'w_3']),
        'test_labels.csv': dict(Image=tests, Id='w_0')}
    for name, columns in write.items():
        pd.DataFrame(columns).to_csv(photos / name, index=False)
    return photos


def use_tables(folder, name):
    """What the scripts do with the table `name`."""
    if name == 'test/animals.csv':
        frames = [read_photographs(folder / name)]
    elif name == 'fluke_finder.csv':
        frames = [list_photographs(folder)]
    elif name == 'test_labels.csv':
        return score_submission(folder / 'sample_submission.csv', folder / name)
    else:
        found = load_tables(folder, pseudo=True)
        frames = [found.train, found.test, unlabelled_playground(found)]
        valid = validation_fold(found.train, 0)
        assert training_rows(found.train, valid, 0).any()
        assert found.group is None or found.group.shape == (len(found.ids),)
        assert all(id.strip('\0') == id for id in np.array(found.ids).tolist())
    for frame in frames:
        assert all(path.startswith(str(folder)) and '..' not in path for path in frame['path'])
        chosen = frame[frame['x0'].notna() | frame['mask_rle'].notna()]
        Crops(chosen, 32, 64, folder / 'cache', cache='none')[np.arange(len(chosen))]


@cases(220)
@given(name=st.sampled_from(TABLES), edits=EDITS)
def test_tables(tables, name, edits):
    whole = (tables / name).read_bytes()
    broken = damaged(whole, edits, TOKENS, other=(tables / 'masks.csv').read_bytes(), head=40)
    with restored(tables / name, broken), case(name):
        use_tables(tables, name)


CELLS = ['', ' ', *(token.decode('utf-8', 'ignore') for token in TOKENS), '1e999', '-1e300', '5e-324', '1e9', '-0.0', '1_0',
         '1 2', '9223372036854775807 2', '1 73728', '0 1', '1 ' * 999]


@cases(120)
@given(name=st.sampled_from(TABLES), cells=st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from(CELLS)), min_size=1, max_size=4))
def test_cells(tables, name, cells):
    table = pd.read_csv(tables / name, dtype=str, na_filter=False)
    for row, column, text in cells:
        table.iloc[row % len(table), column % table.shape[1]] = text
    with restored(tables / name, table.to_csv(index=False).encode()), case(name):
        use_tables(tables, name)


@cases(40)
@given(name=st.sampled_from(TABLES), data=st.binary(max_size=200))
def test_tables_of_any_bytes(tables, name, data):
    with restored(tables / name, data), case(name):
        use_tables(tables, name)


INTEGERS = st.one_of(st.integers(0, 400), st.integers(0, 80_000), st.sampled_from([2 ** 63 - 1, 2 ** 63, 2 ** 62, 73_728, -1, 0]))


@cases(250)
@given(rle=st.one_of(st.lists(INTEGERS, max_size=12).map(lambda some: ' '.join(map(str, some))), st.text(max_size=30),
                     st.text('0123456789 -.e\t\n\u0661', max_size=60)))
def test_rle(rle):
    with case('RLE'):
        mask = decode_rle(rle)
        assert mask.shape == (192, 384) and mask.max() <= 1
        assert read_mask(None, rle, (20, 30)).shape == (20, 30)


# ---- images ----------------------------------------------------------------------------------------------------------

def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def valid_images():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(cv2.resize(coarse, (90, 60), interpolation=cv2.INTER_CUBIC))
    turned, grey, more = Image.Exif(), picture.convert('L'), [picture.rotate(180), picture.rotate(90)]
    turned[0x0112] = 6
    turned.get_ifd(0x8769)[0x9003] = '2020:01:01 00:00:00'
    frames = dict(save_all=True, append_images=more)
    return {
        'jpeg': encode(picture, 'JPEG'), 'jpeg grey': encode(grey, 'JPEG'), 'jpeg cmyk': encode(picture.convert('CMYK'), 'JPEG'),
        'jpeg progressive': encode(picture, 'JPEG', progressive=True), 'jpeg exif': encode(picture, 'JPEG', exif=turned),
        'mpo': encode(picture, 'MPO', **frames), 'png': encode(picture, 'PNG'), 'png exif': encode(picture, 'PNG', exif=turned),
        'png palette': encode(picture.convert('P'), 'PNG'), 'png bits': encode(picture.convert('1'), 'PNG'),
        'png 16': cv2.imencode('.png', np.asarray(picture).astype(np.uint16) * 257)[1].tobytes(),
        'png 16 grey': encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), 'PNG'),
        'apng': encode(picture.convert('RGBA'), 'PNG', **frames), 'gif': encode(picture, 'GIF'),
        'gif moving': encode(picture, 'GIF', **frames), 'bmp': encode(picture, 'BMP'), 'ppm': encode(picture, 'PPM'),
        'pgm text': b'P2\n6 4\n255\n' + b'12 200 7 90 ' * 6, 'tiff': encode(picture, 'TIFF', exif=turned),
        **{f'tiff {name}': encode(picture, 'TIFF', compression=name) for name in ('tiff_lzw', 'jpeg', 'tiff_adobe_deflate')},
        'webp': encode(picture, 'WEBP', exif=turned), 'webp lossless': encode(picture, 'WEBP', lossless=True),
        'webp moving': encode(picture, 'WEBP', **frames)}


IMAGES = valid_images()


def mend_png(data):
    """Right checksums in place of wrong ones, so that the reader looks further."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at:at + 4], 'big')
        data[end:end + 4] = zlib.crc32(data[at + 4:end]).to_bytes(4, 'big')
        at = end + 4
        if at > 10 ** 6:
            break
    return bytes(data)


def use_image(path):
    """As a photograph and as a mask, decoded and cut, and as a thumbnail."""
    frame = pd.DataFrame(dict(path=[str(path)] * 2, mask_path=[None, str(path)], mask_rle=None, **dict.fromkeys(BOX, np.nan)))
    bad = find_bad_images([str(path)])
    marks = fingerprints([str(path)])
    assert marks.shape == (1, 1024) and np.isfinite(marks).all()
    crops = Crops(frame, 32, 64, path.parent, workers=1, cache='none')
    crops.readable(True)
    crops[np.arange(2)]
    for reason in [*bad.values(), *crops.failed.values()]:
        raise UserError(reason)


@cases(280)
@given(name=st.sampled_from(sorted(IMAGES)), other=st.sampled_from(sorted(IMAGES)), edits=EDITS, mend=st.booleans())
def test_images(work, name, other, edits, mend):
    data = damaged(IMAGES[name], edits, other=IMAGES[other], head=120)
    (work / 'a.jpg').write_bytes(mend_png(data) if mend and 'png' in name else data)
    with case(name):
        use_image(work / 'a.jpg')


MAGIC = [b'', b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'BM', b'II*\0\x08\0\0\0', b'MM\0*\0\0\0\x08',
         b'II+\0\x08\0\0\0', b'RIFF\xff\0\0\0WEBPVP8 ', b'RIFF\xff\0\0\0WEBPVP8X', b'P6 9 9 255\n', b'P3 9 9 9\n',
         b'Pf\n9 9\n-1\n']


@cases(40)
@given(magic=st.sampled_from(MAGIC), data=st.binary(max_size=200))
def test_images_of_any_bytes(work, magic, data):
    (work / 'a.jpg').write_bytes(magic + data)
    with case('any bytes'):
        use_image(work / 'a.jpg')


# ---- checkpoints and arrays ------------------------------------------------------------------------------------------

def mend_zip(path, edits, store):
    """Damage the first parts of a zip instead, each with a right checksum, so that the reader looks further."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    names = list(parts)
    for edit in edits:
        name = names[edit[2] // 7 % min(len(names), 3)]
        parts[name] = damaged(parts[name], [edit], head=128)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED if store else zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(name, data)


def spoil(path, whole, edits, way):
    path.write_bytes(whole if way else damaged(whole, edits, head=200))
    if way:
        mend_zip(path, edits, way == 1)


@pytest.fixture
def settled(trained, drawn):
    """Trained, with what an answer needs: constants, the table, and a function that answers with a checkpoint."""
    assert trained.answer().code == 0
    given = arguments(data_dir=drawn, run='r', device='cpu', threads=1, precision='fp32')
    c = read_constants(vars(answer), given, answer.RULES)
    tables, crops = load_tables(drawn), {}
    table, asked = tables.train.sort_values('Image', ignore_index=True), tables.test.assign(bad=False)

    def member(path):
        found = Member(c, path, table, tables.ids, crops)
        scores = found.scores(asked)
        assert scores.table.shape == (len(asked), len(scores.ids))
        answer.validate([scores], [1.0], table, asked)

    given = arguments(**together(data_dir=drawn, max_iters=4, eval_every=2))
    return SimpleNamespace(scripts=trained, member=member, training=read_constants(vars(train), given, train.RULES))


WAYS = st.sampled_from([0, 0, 1, 1, 1, 2])


@cases(40)
@given(edits=EDITS, way=WAYS)
def test_checkpoints(settled, work, edits, way):
    folder = work / 'results/x'
    folder.mkdir(exist_ok=True)
    spoil(folder / 'last.pth', (work / 'results/r/last.pth').read_bytes(), edits, way)
    with case('checkpoint'):
        settled.member(folder / 'last.pth')
    with case('last.pth'):
        plan(settled.training, folder)


HOSTILE = [
    None, -1, 0, 10 ** 9, 10 ** 30, 0.5, float('nan'), True, '', 'x', 'timm/x', b'x', (), [], {}, [1], [None], ['w_0'], [['a']],
    {'x': 1}, {1: 2}, torch.zeros(2), torch.zeros(()), torch.zeros(3, 2).long(), torch.ones(1).expand(10 ** 6, 10 ** 6),
    torch.full((24,), float('nan')), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse(),
    torch.zeros(4, device='meta')]


@cases(20)
@given(data=st.data())
def test_contents_of_checkpoints(settled, work, data):
    folder = work / 'results/x'
    folder.mkdir(exist_ok=True)
    state = torch.load(work / 'results/r/last.pth', weights_only=True)
    for _ in range(data.draw(st.integers(1, 2))):
        where = state
        key = data.draw(st.sampled_from(sorted(state)))
        if isinstance(where.get(key), (dict, list)) and where[key] and data.draw(st.booleans()):
            where = where[key]
            key = data.draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where))))
        if isinstance(where, dict) and data.draw(st.integers(0, 3)) == 0:
            del where[key]
        else:
            where[key] = deepcopy(data.draw(st.sampled_from(HOSTILE)))  # the next change may lie within it
        if not state:
            break
    torch.save(state, folder / 'last.pth')
    with case('contents of a checkpoint'):
        settled.member(folder / 'last.pth')
    with case('contents of last.pth'):
        plan(settled.training, folder)


def clear(result):
    """Code 0, or 2 with one line."""
    assert result.code in (0, 2), result
    if result.code:
        assert len([line for line in result.err.splitlines() if line.startswith('error: ')]) == 1


@cases(16)
@given(name=st.sampled_from(['scores.npz', 'gallery_best.npz']), edits=EDITS, way=WAYS)
def test_arrays(settled, work, name, edits, way):
    path = work / 'results/r' / name
    whole = path.read_bytes()
    with restored(path, whole):
        spoil(path, whole, edits, way)
        with case(name):
            clear(settled.scripts.answer(**dict(run=str(path)) if name == 'scores.npz' else {}))


ARRAYS = [
    np.zeros(0), np.zeros(3), np.array('x'), np.array(5), np.array(['a', 'b']), np.array([None, 'x'], object), np.zeros((12, 10)),
    np.zeros((2, 2, 24)), np.full((12, 10), np.nan, np.float16), np.zeros((6, 10), np.float16), np.zeros(12, bool),
    np.ones(26, bool), np.array(['w_0'] * 26), np.zeros((26, 2, 24), np.float16), np.full((26, 2, 24), np.nan, np.float16),
    np.array([b'x'])]


@cases(14)
@given(name=st.sampled_from(['scores.npz', 'gallery_best.npz']), data=st.data())
def test_contents_of_arrays(settled, work, name, data):
    path = work / 'results/r' / name
    with np.load(path) as file:
        content = dict(file)
    with restored(path, path.read_bytes()):
        for _ in range(data.draw(st.integers(1, 2))):
            key, value = data.draw(st.sampled_from(sorted(content))), data.draw(st.sampled_from(range(-5, len(ARRAYS))))
            change = {-1: lambda a: a[..., None], -2: lambda a: a[:-1] if a.ndim else a, -3: lambda a: a.astype(str),
                      -4: lambda a: np.roll(a, 1), -5: lambda a: a[[0] * len(a)] if a.ndim else a}
            content[key] = ARRAYS[value] if value >= 0 else change[value](content[key])
        np.savez(path, **content)
        with case(f'contents of {name}'):
            clear(settled.scripts.answer(**dict(run=str(path)) if name == 'scores.npz' else {}))


@cases(20)
@given(edits=EDITS, way=WAYS)
def test_weights_of_the_fluke_finder(work, edits, way):
    path = work / 'weights.pth'
    if not path.exists():
        torch.save({'key': 'k', 'height': 32, 'width': 64, 'model': FlukeFinder().state_dict()}, work / 'whole.pth')
    spoil(path, (work / 'whole.pth').read_bytes(), edits, way)
    with case('weights.pth'):
        load_network(path)
