"""The bytes of one file -> pixels, and the check of all files before training."""
import dataclasses
import io
import os
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.log import in_threads

# A file that claims more is refused before it fills the memory. The other formats take four times the memory of JPEG and PNG.
MAX_PIXELS, MAX_PIXELS_OTHER = 64_000_000, 32_000_000
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')  # MPO, JPEGs in a row, counts as JPEG
MASK_ROWS, MASK_COLUMNS = 192, 384      # size of the masks in masks.csv, which cover the whole photograph
JPEG_END, PNG_END = b'\xff\xd9', b'IEND\xaeB`\x82'

warnings.filterwarnings('ignore', module=r'PIL\.')  # about size, where MAX_PIXELS decides, and about damaged EXIF


class BadImage(UserError):
    """A file that is no whole, readable image; `reason` says why in a few words."""

    def __init__(self, path, reason):
        super().__init__(f'{path} cannot be used as an image ({reason}): replace it or delete its row')
        self.reason = reason


def read_image(path, as_mask=False, thumbnail=False):
    """Pixels of an image file, upright: (H, W, 3) uint8 RGB. The content tells the format, not the name.

    Transparency is dropped, 16 bits become 8. `as_mask` keeps a greyscale file as it is, (H, W), in less time; `thumbnail`
    gives most files in grey, at half their size. Raises BadImage (a UserError) for anything that is not whole.
    """
    try:
        with open(path, 'rb') as file:
            data = file.read()
        header = _read_header(path, io.BytesIO(data))
        _require_end(path, header, data)
        # OpenCV, the faster one, turns rotated JPEGs upright, and rotated PNGs in its newest versions only
        if header.format in ('JPEG', 'MPO') or header.format == 'PNG' and 'exif' not in header.info:
            flag = cv2.IMREAD_REDUCED_GRAYSCALE_2 if thumbnail else \
                cv2.IMREAD_GRAYSCALE if as_mask and header.mode in ('1', 'L') else cv2.IMREAD_COLOR_RGB
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
            if image is not None:
                return image
            raise BadImage(path, 'its pixels do not decode')
        return _read_slowly(header)
    except (UserError, MemoryError):  # the second says nothing of the file
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        raise BadImage(path, _reason(error)) from error


def _read_slowly(image):
    """Pixels of an opened Pillow image."""
    if image.mode == 'F':
        raise ValueError('its pixels are floating-point numbers, of no known range')
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I'):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return np.array(image.convert('RGB'))


def _read_header(path, file):
    """The Pillow image of an open file, its pixels not yet decoded. Raises BadImage."""
    try:
        header = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:
        empty = file.seek(0, os.SEEK_END) == 0
        raise BadImage(path, 'the file is empty' if empty else _reason(error)) from error
    most = MAX_PIXELS if header.format in ('JPEG', 'MPO', 'PNG') else MAX_PIXELS_OTHER
    if not 0 < header.width * header.height <= most:
        raise BadImage(path, f'{header.width} x {header.height} pixels are none, or more than {most}')
    return header


def read_size(path):
    """Width and height of an image file, upright; NaN where they cannot be read."""
    try:
        with open(path, 'rb') as file:
            header = _read_header(path, file)
            return header.size[::-1] if header.getexif().get(0x0112, 1) > 4 else header.size  # Exif's orientation
    except Exception:  # decoders raise whatever a broken file leads them to
        return float('nan'), float('nan')


def _require_end(path, header, data):
    """Raise BadImage unless a JPEG or PNG holds its end marker; older OpenCV paints what is cut off grey."""
    if header.format in ('JPEG', 'MPO'):
        position = 2
        while data[position:position + 1] == b'\xff' and data[position + 1:position + 2] != b'\xda':
            fill = data[position + 1:position + 2] == b'\xff'
            position += 1 if fill else 2 + int.from_bytes(data[position + 2:position + 4], 'big')
        # within the coded pixels 0xff is always followed by 0 or a restart; a thumbnail ends before them
        end = data.find(JPEG_END, position)
        whole = end >= 0
        if header.width * header.height * data.count(b'\xff\xda', position, end) > 10 * MAX_PIXELS:  # minutes of decoding
            raise BadImage(path, 'it has too many scans')
    else:
        whole = header.format != 'PNG' or PNG_END in data
    if not whole:
        raise BadImage(path, 'the file is cut off')


def _reason(error):
    if isinstance(error, Image.UnidentifiedImageError):
        return 'it is not an image'
    if isinstance(error, Image.DecompressionBombError):
        return 'far too many pixels'
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def decode_rle(rle, rows=MASK_ROWS, columns=MASK_COLUMNS):
    """'start length start length ...' -> (rows, columns) uint8 0/1; starts count from 1, down the columns."""
    try:
        numbers = np.array(rle.split(), dtype=np.int64)
        starts, lengths = numbers[0::2] - 1, numbers[1::2]
        fits = len(starts) == len(lengths) and (starts >= 0).all() and (lengths > 0).all() and \
            (starts <= rows * columns - lengths).all()
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise UserError(f'the mask {rle[:40]!r} of masks.csv is not a start and a length for each run '
                        f'within {rows} x {columns} pixels: mend or delete that row')
    steps = np.zeros(rows * columns + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + lengths, -1)
    return (np.cumsum(steps[:-1]) > 0).astype(np.uint8).reshape(columns, rows).T


def read_mask(mask_path, mask_rle, shape):
    """Where the fluke is, at the photograph's size `shape` (H, W): uint8 0/1; zeros if both sources are None.

    An image file counts as fluke where it is brighter than half, or above zero if it holds only 0 and 1.
    """
    if mask_path is not None:
        mask = read_image(mask_path, as_mask=True)
        mask = mask.max(axis=2) if mask.ndim == 3 else mask
        mask = (mask > (127 if mask.max() > 1 else 0)).astype(np.uint8)
    elif mask_rle is not None:
        mask = np.ascontiguousarray(decode_rle(mask_rle))
    else:
        return np.zeros(shape, np.uint8)
    if mask.shape == tuple(shape):
        return mask
    return cv2.resize(mask, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST_EXACT)


def find_bad_images(paths):
    """Files that are no whole images: dict path -> reason. Reads only heads and tails, in threads."""
    def reason(path):
        try:
            _check(path)
        except BadImage as error:
            return error.reason

    reasons = in_threads(reason, paths, 'checking images')
    return {path: reason for path, reason in zip(paths, reasons) if reason}


def _check(path):
    """Raise BadImage for a file that is not whole, without decoding a JPEG's or PNG's pixels."""
    try:
        with open(path, 'rb') as file:
            header = _read_header(path, file)
            if header.format not in ('JPEG', 'MPO', 'PNG'):
                read_image(path)
                return
            end = PNG_END if header.format == 'PNG' else JPEG_END
            file.seek(0, os.SEEK_END)
            file.seek(-min(len(end), file.tell()), os.SEEK_END)
            if file.read() != end:  # cut off, or with something after the image: look closer
                file.seek(0)
                _require_end(path, header, file.read())
    except OSError as error:
        raise BadImage(path, _reason(error)) from error


def check_images(tables, skip_bad_images=False):
    """The tables without the training images, and the masks, that cannot be read; `notes` says which.

    Test images all stay, since each must be answered: their new column `bad` marks those that cannot be read.
    Raises a UserError that lists the bad files, unless `skip_bad_images`.
    """
    train, test = tables.train, tables.test
    masks = [path for frame in (train, test) for path in frame['mask_path'].dropna()]
    bad = find_bad_images([*train['path'], *test['path'], *masks])
    named = [f'{os.path.relpath(path, tables.data_dir)} ({reason})' for path, reason in bad.items()]
    shown = f'{len(bad)} image files cannot be read: {", ".join(named[:10])}{" ..." if len(bad) > 10 else ""}'
    if bad and not skip_bad_images:
        raise UserError(f'{shown}; replace them, or set skip_bad_images = True to go on without them')
    train = train[~train['path'].isin(bad)].reset_index(drop=True)
    test = test.assign(bad=test['path'].isin(bad))
    for frame in (train, test):
        frame.loc[frame['mask_path'].isin(bad), 'mask_path'] = None
    return dataclasses.replace(tables, train=train, test=test, notes=tables.notes + [shown] * bool(bad))
