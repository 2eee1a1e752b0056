import io
import os
import struct
import zlib

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from data.decode import check_images, decode_rle, find_bad_images, read_image, read_mask
from data.tables import NEW_WHALE, load_tables
from utils.errors import UserError

ORIENTATION = 0x0112


@pytest.fixture(scope='module')
def picture():
    """A smooth picture without symmetry, 90 x 60."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (90, 60), interpolation=cv2.INTER_CUBIC))


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def rotated(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def assert_like_pillow(path):
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert('RGB')).astype(int)
    found = read_image(path)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('orientation', [1, 3, 6, 7])
def test_jpeg_like_pillow(tmp_path, picture, mode, orientation):
    (tmp_path / 'a.jpg').write_bytes(encode(picture.convert(mode), format='JPEG', exif=rotated(orientation)))
    assert_like_pillow(tmp_path / 'a.jpg')
    shape = (60, 90, 3) if orientation in (1, 3) else (90, 60, 3)
    assert read_image(tmp_path / 'a.jpg').shape == shape


def test_cmyk_without_adobes_inversion_is_read_as_pillow_does(tmp_path, picture):
    data = encode(picture.convert('CMYK'), format='JPEG')
    start = data.index(b'Adobe') - 4
    length = 2 + int.from_bytes(data[start + 2:start + 4], 'big')
    (tmp_path / 'a.jpg').write_bytes(data[:start] + data[start + length:])
    assert_like_pillow(tmp_path / 'a.jpg')


def test_progressive_jpeg_and_trailing_bytes(tmp_path, picture):
    (tmp_path / 'a.jpg').write_bytes(encode(picture, format='JPEG', progressive=True) + bytes(5000))
    assert_like_pillow(tmp_path / 'a.jpg')
    assert find_bad_images([str(tmp_path / 'a.jpg')]) == {}


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA'])
def test_png_named_jpg_is_read_by_content(tmp_path, picture, mode):
    image = picture.convert(mode)
    if mode.endswith('A'):
        image.putalpha(picture.convert('L').rotate(180))
    for options in ({}, {'exif': rotated(6)}):
        (tmp_path / 'a.jpg').write_bytes(encode(image, format='PNG', **options))
        assert_like_pillow(tmp_path / 'a.jpg')


@pytest.mark.parametrize('kind', ['GIF', 'BMP', 'TIFF', 'WEBP'])
def test_other_formats(tmp_path, picture, kind):
    (tmp_path / 'a.jpg').write_bytes(encode(picture, format=kind))
    assert_like_pillow(tmp_path / 'a.jpg')
    assert find_bad_images([str(tmp_path / 'a.jpg')]) == {}


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize('grey', [True, False])
def test_sixteen_bits_keep_their_brightness(tmp_path, picture, suffix, grey):
    pixels = np.asarray(picture.convert('L') if grey else picture)
    cv2.imwrite(str(tmp_path / f'a{suffix}'), pixels.astype(np.uint16)[..., ::1 if grey else -1] * 257)
    expected = np.repeat(pixels[..., None], 3, 2) if grey else pixels
    assert np.abs(read_image(tmp_path / f'a{suffix}').astype(int) - expected).max() <= 1


def bomb():
    """A PNG of a hundred bytes that claims 12000 x 9000 pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', 12000, 9000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def thumbnailed(picture):
    """A JPEG whose EXIF part holds a whole small JPEG, with its own end marker."""
    data, thumbnail = encode(picture, format='JPEG'), encode(picture.resize((9, 6)), format='JPEG')
    return data[:2] + b'\xff\xe1' + struct.pack('>H', 2 + len(thumbnail)) + thumbnail + data[2:]


def broken_files(picture):
    jpeg, png, gif = (encode(picture, format=kind) for kind in ('JPEG', 'PNG', 'GIF'))
    progressive, inner = encode(picture, format='JPEG', progressive=True), thumbnailed(picture)
    return {'empty': (b'', 'empty'), 'page': (b'<!DOCTYPE html><html>404</html>', 'not an image'),
            'half': (jpeg[:len(jpeg) // 2], 'cut off'), 'tail': (jpeg[:-2], 'cut off'),
            'padded': (jpeg[:-300] + bytes(300), 'cut off'), 'scans': (progressive[:-400], 'cut off'),
            'thumbnail': (inner[:-200], 'cut off'), 'png': (png[:-500], 'cut off'), 'gif': (gif[:-500], ''),
            'stub': (jpeg[:30], ''), 'bomb': (bomb(), '12000 x 9000'), 'text': (b'word\n' * 99, 'not an')}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_broken_files_are_named_by_the_check_and_by_the_reader(tmp_path, picture):
    broken = broken_files(picture)
    for name, (data, _) in broken.items():
        (tmp_path / f'{name}.jpg').write_bytes(data)
    (tmp_path / 'thumbnailed.jpg').write_bytes(thumbnailed(picture))
    (tmp_path / 'good.jpg').write_bytes(encode(picture, format='JPEG'))
    paths = [str(path) for path in [*sorted(tmp_path.iterdir()), tmp_path / 'gone.jpg']]
    bad = find_bad_images(paths)
    assert {os.path.basename(path)[:-4] for path in bad} == {*broken, 'gone'}
    for name, (_, reason) in broken.items():
        path = str(tmp_path / f'{name}.jpg')
        assert reason in bad[path]
        with pytest.raises(UserError) as caught:
            read_image(path)
        assert path in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(UserError, match='gone.jpg'):
        read_image(tmp_path / 'gone.jpg')
    assert read_image(tmp_path / 'thumbnailed.jpg').shape == (60, 90, 3)


def test_damage_behind_a_sound_header_is_found_by_the_reader(tmp_path, picture):
    data = bytearray(encode(picture, format='PNG'))
    for position in range(len(data) // 2, len(data) // 2 + 40):
        data[position] ^= 0x55
    (tmp_path / 'a.png').write_bytes(data)
    with pytest.raises(UserError, match='a.png'):
        read_image(tmp_path / 'a.png')


def test_rle_runs_down_the_columns_from_one():
    mask = decode_rle('1 2 6 1 12 1', rows=4, columns=3)
    assert mask.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]] and mask.dtype == np.uint8
    assert decode_rle('').shape == (192, 384) and decode_rle('').sum() == 0
    assert decode_rle('1 73728').all()


@pytest.mark.parametrize('rle', ['1 2 3', 'a b', '0 2', '5 0', '5 -1', '73728 2', '1.5 2', 20 * '9' + ' 1'])
def test_malformed_rle_is_refused(rle):
    with pytest.raises(UserError, match='masks.csv'):
        decode_rle(rle)


def test_rle_mask_covers_the_whole_photograph():
    """The left fifth, and the upper half of the left half."""
    small = np.zeros((192, 384), np.uint8)
    small[:, :76] = 1
    small[:96, :192] = 1
    runs = ' '.join(f'{column * 192 + 1} {small[:, column].sum()}' for column in range(192))
    mask = read_mask(None, runs, (192, 768))
    assert mask.dtype == np.uint8 and (mask == np.repeat(small, 2, axis=1)).all()
    assert (read_mask(None, runs, (192, 384)) == small).all()
    assert (read_mask(None, runs, (64, 128)) == small[1::3, 1::3]).all()   # pixel centres


def test_mask_files(tmp_path):
    soft = np.zeros((4, 6), np.uint8)
    soft[0, :3], soft[1, 0] = 200, 100
    Image.fromarray(soft).save(tmp_path / 'soft.png')
    assert read_mask(str(tmp_path / 'soft.png'), '1 1', (4, 6)).tolist() == (soft > 127).astype(int).tolist()
    assert read_mask(str(tmp_path / 'soft.png'), None, (8, 6))[:2, :3].all()
    assert read_mask(str(tmp_path / 'soft.png'), None, (8, 6)).sum() == 6
    Image.fromarray((soft > 127).astype(np.uint8)).save(tmp_path / 'bits.png')
    assert read_mask(str(tmp_path / 'bits.png'), None, (4, 6)).sum() == 3
    nothing = read_mask(None, None, (5, 7))
    assert nothing.shape == (5, 7) and nothing.dtype == np.uint8 and not nothing.any()


@pytest.fixture
def spoilt(tmp_path, picture):
    """Four training and two test images, of which b, d, the test image z and the mask of a are broken."""
    images = {'train': ['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg'], 'test': ['y.jpg', 'z.jpg']}
    for part, names in images.items():
        (tmp_path / part).mkdir()
        for name in names:
            data = b'' if name in ('b.jpg', 'd.jpg', 'z.jpg') else encode(picture, format='JPEG')
            (tmp_path / part / name).write_bytes(data)
    (tmp_path / 'masks').mkdir()
    (tmp_path / 'masks' / 'a.png').write_bytes(b'no mask')
    (tmp_path / 'masks' / 'c.png').write_bytes(encode(picture.convert('L'), format='PNG'))
    labels = pd.DataFrame({'Image': images['train'], 'Id': ['w_1', 'w_2', NEW_WHALE, 'w_1']})
    labels.to_csv(tmp_path / 'train.csv', index=False)
    pd.DataFrame({'Image': images['test']}).to_csv(tmp_path / 'sample_submission.csv', index=False)
    return load_tables(tmp_path)


def test_check_lists_all_bad_images_together(spoilt):
    with pytest.raises(UserError) as caught:
        check_images(spoilt)
    message = str(caught.value)
    for words in ('4 image files', 'b.jpg (the file is empty)', 'd.jpg', 'z.jpg', 'a.png', 'skip_bad_images'):
        assert words in message


def test_skipping_keeps_every_test_image_and_every_id(spoilt):
    tables = check_images(spoilt, skip_bad_images=True)
    assert tables.train['Image'].tolist() == ['a.jpg', 'c.jpg'] and tables.train.index.tolist() == [0, 1]
    assert tables.test['Image'].tolist() == ['y.jpg', 'z.jpg']
    assert tables.test['bad'].tolist() == [False, True]
    assert tables.train['mask_path'].isna().tolist() == [True, False] and tables.ids == ['w_1', 'w_2']
    assert '4 image files' in tables.notes[-1]
    assert len(spoilt.train) == 4 and spoilt.train['mask_path'].notna().sum() == 2


def test_check_of_sound_images_changes_nothing(spoilt):
    for part, name in (('train', 'b.jpg'), ('train', 'd.jpg'), ('test', 'z.jpg')):
        (spoilt.data_dir / part / name).write_bytes((spoilt.data_dir / 'train' / 'a.jpg').read_bytes())
    (spoilt.data_dir / 'masks' / 'a.png').write_bytes((spoilt.data_dir / 'masks' / 'c.png').read_bytes())
    tables = check_images(spoilt)
    assert tables.train.equals(spoilt.train) and not tables.test['bad'].any() and tables.notes == spoilt.notes


def test_check_names_at_most_ten(tmp_path, picture):
    names = [f'{k:02}.jpg' for k in range(14)]
    (tmp_path / 'train').mkdir()
    for name in names:
        (tmp_path / 'train' / name).touch()
    pd.DataFrame({'Image': names, 'Id': 'w_1'}).to_csv(tmp_path / 'train.csv', index=False)
    with pytest.raises(UserError, match=r'14 image files .*09.jpg \(the file is empty\) \.\.\.') as caught:
        check_images(load_tables(tmp_path))
    assert '10.jpg' not in str(caught.value)


def test_memory_that_ends_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError
    cv2.imwrite(str(tmp_path / 'a.jpg'), np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(cv2, 'imdecode', no_memory)
    with pytest.raises(MemoryError):
        read_image(tmp_path / 'a.jpg')
