"""Broken and hostile input: one sentence or a sound result, no traceback. SOAK=1 (make soak): twenty times as many cases."""
import io
import os
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
from data.decode import decode_rle, find_bad_images, read_image, read_mask
from data.duplicates import fingerprints
from data.images import Crops
from data.tables import BOX, NEW_WHALE, load_tables, read_photographs, training_rows, unlabelled_playground, validation_fold
from models import backbone
from models.finder_net import FlukeFinder
from models.fluke_finder import list_photographs, load_network
from tests.conftest import CASES, SOAK, arguments, assert_refused, interrupt_at, together
from utils import checkpoint
from utils.constants import read_constants
from utils.errors import UserError
from utils.files import sha256
from utils.member import Member, saved_scores
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
    bad = find_bad_images([str(path)], workers=1)
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
    c = read_constants(answer.__file__, given, answer.RULES)
    tables, crops = load_tables(drawn), {}
    table, asked = tables.train.sort_values('Image', ignore_index=True), tables.test.assign(bad=False)

    def member(path):
        found = Member(c, path, table, tables.ids, crops)
        scores = found.scores(asked)
        assert scores.table.shape == (len(asked), len(scores.ids))
        answer.validate([scores], [1.0], table, asked)

    given = arguments(**together(data_dir=drawn, max_iters=4, eval_every=2))
    return SimpleNamespace(scripts=trained, member=member, training=read_constants(train.__file__, given, train.RULES))


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
            key, value = data.draw(st.sampled_from(sorted(content))), data.draw(st.sampled_from(range(-4, len(ARRAYS))))
            change = {-1: lambda a: a[..., None], -2: lambda a: a[:-1] if a.ndim else a, -3: lambda a: a.astype(str),
                      -4: lambda a: np.roll(a, 1)}
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


# ---- each by itself --------------------------------------------------------------------------------------------------

BAD_NAMES = ['../a.jpg', '/etc/passwd', 'sub\\a.jpg', '..', '.', 'a\0.jpg', 'a\n.jpg', 'a\x1b[2J.jpg', 'x' * 300 + '.jpg']


@pytest.mark.parametrize('bad', BAD_NAMES, ids=lambda text: ascii(text)[1:12])
@pytest.mark.parametrize('name', ['train.csv', 'sample_submission.csv', 'playground/train.csv', 'pseudo_labels.csv',
                                  'test/animals.csv'])
def test_a_name_that_leads_elsewhere_is_refused(tables, name, bad):
    table = pd.read_csv(tables / name).astype(str)
    table.loc[0, 'Image'] = bad
    table.to_csv(tables / name, index=False)
    with pytest.raises(UserError, match='paths|control characters|not a CSV') as error:
        use_tables(tables, name)
    assert str(error.value).isprintable() and name in str(error.value)


@pytest.mark.parametrize('name', ['bboxes.csv', 'masks.csv', 'fluke_finder.csv'])
def test_other_tables_names_are_compared_and_never_opened(tables, name):
    table = pd.read_csv(tables / name).astype(str)
    table.iloc[0, 0] = '../../etc/passwd'
    table.to_csv(tables / name, index=False)
    use_tables(tables, name)


def test_links_that_the_user_made_are_followed(tables, tmp_path):
    photograph = sorted((tables / 'train').iterdir())[0]
    photograph.rename(tmp_path / 'elsewhere.jpg')
    photograph.symlink_to(tmp_path / 'elsewhere.jpg')
    use_tables(tables, 'train.csv')


def test_file_names_that_are_no_text_do_not_end_a_run(scripts, tables, monkeypatch):
    odd = os.fsencode(tables) + b'/%s/\xff\n.jpg'
    for part in (b'train', b'test', b'playground/train', b'masks'):
        os.makedirs(os.path.dirname(odd % part), exist_ok=True)
        with open(odd % part, 'wb') as file:
            file.write(IMAGES['jpeg'])
    assert scripts.train(data_dir=tables, max_iters=1).code == 0
    assert scripts.answer(data_dir=tables, pseudo_label_min_score=0.5).code == 0
    assert all(map(str.isprintable, list_photographs(tables)['Image']))


def test_many_rows_that_join_ids_one_after_another(tables):
    names = [f'g{n}' for n in range(20_000)]
    pd.DataFrame(dict(Id=names, SubId=['w_1 w_0', *['w_0'] * (len(names) - 1)])).to_csv(tables / 'duplicate_ids.csv', index=False)
    with case('duplicate_ids.csv'):
        group = load_tables(tables).group
    assert group[0] == group[1] and len(set(group)) == 9


def claims(width, height):
    """Small files that claim a size."""
    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')

    head = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x01\0\0\0\0'
    row = b'\0' * (width // 8 + 1)
    packer, lines = zlib.compressobj(9), []
    for _ in range(height):
        lines.append(packer.compress(row))
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', b''.join(lines) + packer.flush()) + chunk(b'IEND', b'')
    jpeg, at = bytearray(IMAGES['jpeg']), IMAGES['jpeg'].index(b'\xff\xc0') + 5
    jpeg[at:at + 4] = height.to_bytes(2, 'big') + width.to_bytes(2, 'big')
    gif = bytearray(IMAGES['gif'])
    gif[6:10] = width.to_bytes(2, 'little') + height.to_bytes(2, 'little')
    frame = bytes(gif[:6]) + b'\1\0\1\0' + bytes(gif[10:])  # a small canvas with a large picture on it
    at = frame.index(b',', 13 + 3 * 2 ** (frame[10] % 8 + 1)) + 5
    frame = frame[:at] + width.to_bytes(2, 'little') + height.to_bytes(2, 'little') + frame[at + 4:]
    webp, at = bytearray(IMAGES['webp']), IMAGES['webp'].index(b'VP8X') + 12
    webp[at:at + 6] = (width - 1).to_bytes(3, 'little') + (height - 1).to_bytes(3, 'little')
    tiff = Image.fromarray(np.zeros((9, 9), np.uint8))
    tiff = bytearray(encode(tiff, 'TIFF', compression='tiff_lzw'))
    start = int.from_bytes(tiff[4:8], 'little')
    for number in range(int.from_bytes(tiff[start:start + 2], 'little')):
        at = start + 2 + 12 * number
        tag = int.from_bytes(tiff[at:at + 2], 'little')
        if tag in (256, 257):
            tiff[at + 2:at + 12] = b'\4\0\1\0\0\0' + (width if tag == 256 else height).to_bytes(4, 'little')
    return dict(png=png, jpeg=bytes(jpeg), gif=bytes(gif), frame=frame, webp=bytes(webp), tiff=bytes(tiff),
                ppm=b'P6 %d %d 255\n\0' % (width, height))


BOMBS = claims(30_000, 30_000)


@pytest.mark.parametrize('kind', BOMBS)
def test_small_files_that_claim_to_be_huge_are_refused(work, kind):
    assert len(BOMBS[kind]) < 200_000
    (work / 'a.jpg').write_bytes(BOMBS[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_image, lambda path: read_mask(str(path), None, (9, 9))):
        with pytest.raises(UserError, match='pixels'):
            read(work / 'a.jpg')
    assert 'pixels' in find_bad_images([str(work / 'a.jpg')])[str(work / 'a.jpg')]
    assert not fingerprints([str(work / 'a.jpg')]).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_jpeg_of_thousands_of_scans_is_refused(work):
    """Each costs as much as the whole picture, and a hundred bytes."""
    whole = encode(Image.new('L', (4000, 3000)), 'JPEG', progressive=True)
    last = whole.rindex(b'\xff\xda')
    (work / 'a.jpg').write_bytes(whole[:last] + whole[last:-2] * 100 + whole[-2:])
    with pytest.raises(UserError, match='too many scans'):
        read_image(work / 'a.jpg')
    (work / 'a.jpg').write_bytes(whole + bytes(range(256)) * 99 + b'\xff\xda' * 999)  # such as a film behind the picture
    assert read_image(work / 'a.jpg').shape == (3000, 4000, 3)


def packed(path, parts, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', how) as file:
        for name, data in parts.items():
            file.writestr(name, data)


def test_compressed_arrays_that_claim_gigabytes_are_refused(work):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr='<f2', fortran_order=False, shape=(2 ** 12, 2 ** 14)))
    packed(work / 'a.npz', {'scores.npy': head.getvalue() + bytes(2 ** 27)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match='a.npz cannot be read .*compressed'):
        saved_scores(work / 'a.npz')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr='<f2', fortran_order=False, shape=(2 ** 30, 2 ** 30)))
    packed(work / 'a.npz', {f'{name}.npy': head.getvalue() for name in ('ids', 'images', 'scores')}, zipfile.ZIP_STORED)
    with pytest.raises(UserError, match='a.npz cannot be read'):
        saved_scores(work / 'a.npz')


@pytest.mark.parametrize('load', [checkpoint.load, load_network])
def test_a_compressed_checkpoint_is_refused(work, load):
    torch.save({'model': torch.zeros(2 ** 20)}, work / 'a.pth')
    with zipfile.ZipFile(work / 'a.pth') as file:
        parts = {name: file.read(name) for name in file.namelist()}
    packed(work / 'a.pth', parts)
    assert (work / 'a.pth').stat().st_size < 10_000
    with pytest.raises(UserError, match='a.pth .*ValueError'):
        load(work / 'a.pth')


@pytest.mark.parametrize('load', [checkpoint.load, load_network])
def test_one_bit_that_fell_over_is_found(settled, work, load):
    """torch itself would load the wrong weights and say nothing."""
    path = work / 'a.pth'
    whole = (work / 'results/r/last.pth').read_bytes()
    if load is load_network:
        torch.save({'key': 'k', 'height': 32, 'width': 64, 'model': FlukeFinder().state_dict()}, path)
        whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1:])
    torch.load(path, weights_only=True)
    with pytest.raises(UserError, match='a.pth'):
        load(path)


class Exploit:
    def __reduce__(self):
        return os.mkdir, ('owned',)


def evil(path):
    """A file of torch, whole but for code in it."""
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, best=Exploit()), path)


def test_code_in_a_file_is_refused_wherever_one_is_read_and_not_run(settled, work, monkeypatch):
    scripts, folder = settled.scripts, work / 'results/r'
    evil(folder / 'last.pth')
    assert_refused(scripts.train(max_iters=4, eval_every=2), 'last.pth')  # go on
    assert_refused(scripts.train(run='new', checkPoint_start=folder / 'last.pth'), 'last.pth')  # start from
    with restored(folder / 'best.pth', (folder / 'best.pth').read_bytes()):
        evil(folder / 'best.pth')
        assert_refused(scripts.answer(), 'best.pth')
    objects = np.array([Exploit()], object)
    for name, run in (('scores.npz', 'results/r/scores.npz'), ('gallery_best.npz', 'r')):
        with np.load(folder / name) as file:
            content = dict(file)
        np.savez(folder / name, **{**content, 'images': objects})
        assert_refused(scripts.answer(run=run), name)
    torch.save({'key': Exploit(), 'height': 32, 'width': 64, 'model': FlukeFinder().state_dict()}, 'weights.pth')
    with pytest.raises(UserError, match='weights.pth'):
        load_network('weights.pth')
    torch.save({'conv1.weight': Exploit()}, 'raw.pth')
    name = f'raw-{sha256("raw.pth")[:8]}.pth'
    (work / 'weights').mkdir()
    os.rename('raw.pth', f'weights/{name}')
    monkeypatch.setitem(backbone.WEIGHTS, 'seresnext14', ('v0', name))
    assert_refused(scripts.train(run='new', pretrained=True), name)
    assert not (work / 'owned').exists()


def test_ids_in_another_order_are_refused(settled, work):
    path = work / 'results/r/best.pth'
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, ids=state['ids'][::-1]), work / 'results/r/other.pth')
    with pytest.raises(UserError, match='other ids .*their order'):
        settled.member(work / 'results/r/other.pth')


@pytest.mark.parametrize('what', ['exp_avg', 'exp_avg_sq', 'one number', 'order', 'group', 'lr'])
def test_moments_that_do_not_fit_their_weights_are_refused(scripts, monkeypatch, what):
    """torch's fused Adam would write beyond them."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 4)
        path = scripts.train().folder / 'last.pth'
    state = torch.load(path, weights_only=True)
    moments, groups = state['optimizer']['state'], state['optimizer']['param_groups']
    if what == 'order':
        moments[0], moments[1] = moments[1], moments[0]
    elif what == 'one number':
        moments[0]['exp_avg'] = torch.ones(1).expand(moments[0]['exp_avg'].shape)
    elif what in moments[0]:
        moments[0][what] = torch.zeros(3)
    else:
        groups[0] = {**groups[0], 'lr': 'x'} if what == 'lr' else {}
    torch.save(state, path)
    assert_refused(scripts.train(), 'last.pth', 'optimizer')


@pytest.mark.parametrize('change', [dict(iteration=-1), dict(elapsed=float('nan')), dict(raw=torch.zeros(2)), dict(kept=[(1.0,)]),
                                    dict(sums='x'), dict(optimizer={}), dict(constants={'height': 32}), dict(ids=[1])], ids=str)
def test_a_training_does_not_go_on_from_contents_that_no_training_writes(settled, work, change):
    path = work / 'results/r/last.pth'
    torch.save({**torch.load(path, weights_only=True), 'finished': False, **change}, path)
    before = path.read_bytes()
    assert_refused(settled.scripts.train(max_iters=4, eval_every=2), 'last.pth', 'no checkpoint of train.py')
    assert path.read_bytes() == before
