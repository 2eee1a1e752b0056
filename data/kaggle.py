"""Fetch and unpack the competition's data: python -m data.kaggle

The `kaggle` client downloads the archive, unless it is there already. No file of yours is written over.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from data.tables import read_csv
from utils.errors import UserError, exit_clearly
from utils.log import progress_bar

NAME = 'humpback-whale-identification'
PAGE = f'https://www.kaggle.com/c/{NAME}'
PARTS = {'train': 25361, 'test': 7960, 'train.csv': 25361, 'sample_submission.csv': 7960}  # photographs, rows
LOG_IN = ('Kaggle does not know you: make a token at https://www.kaggle.com/settings and save it as ~/.kaggle/kaggle.json or '
          'in the variable KAGGLE_API_TOKEN, as that page says')
REASONS = {  # words of the client's, versions 1.5 to 2.2, and what they mean
    'forbidden': f'Kaggle gives no data until you accept the rules: do so, logged in, at {PAGE}/rules',
    'no space left': 'the disk is full: make room',
    **dict.fromkeys(('unauthorized', 'authenticat', 'could not find', 'missing username'), LOG_IN)}


def fetch(folder, parts):
    """Bring those of the `parts` into `folder` that are not there; whether there were any. UserError says what to do."""
    there, archive = count(folder, parts), folder / f'{NAME}.zip'
    other = [f'{name}: {there[name]} in place of {parts[name]}' for name in there if there[name] != parts[name]]
    if other:
        raise UserError(f'{folder} holds some of the data, or an edited copy ({"; ".join(other)}), and is left as it is: '
                        'move that away to have it fetched anew')
    if there == parts:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if not zipfile.is_zipfile(archive):  # not there, or cut off: then the client goes on where it stopped
        download(archive)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.kaggle-') as temporary:
        new = Path(temporary)
        try:
            unpack(archive, new)
        except OSError as error:
            raise UserError(f'{archive} cannot be unpacked ({error.strerror}): mend that, then run this again') from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise UserError(f'{archive} is cut off or broken: delete it, then run this again') from error
        if count(new, parts) != parts:
            raise UserError(f'{archive} is not the data of {PAGE}: it has {count(new, parts)}, and should have {parts}')
        for name in parts.keys() - there:
            os.replace(new / name, folder / name)
    return True


def count(folder, parts):
    """What there is of `parts` in `folder`: name -> photographs in a folder, rows of a CSV."""
    return {name: len(read_csv(folder / name)) if name.endswith('.csv') else len(list((folder / name).glob('*.jpg')))
            for name in parts if (folder / name).exists()}


def download(archive):
    """Let the client write `archive`; its progress bar is passed on, and its last words explain why it failed."""
    by_hand = f', then run this again; or press Download All at {PAGE}/data and move {NAME}.zip to {archive.parent}'
    client = shutil.which('kaggle') or shutil.which('kaggle', path=os.path.dirname(sys.executable))
    if client is None:
        raise UserError(f'the kaggle client is not installed: {sys.executable} -m pip install kaggle{by_hand}')
    command, said = [client, 'competitions', 'download', '-c', NAME, '-p', str(archive.parent)], ''
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while chunk := os.read(process.stdout.fileno(), 4096).decode(errors='replace'):  # type: ignore[union-attr]
            said = (said + chunk)[-4000:]
            bar = chunk.rpartition('\r')[0]  # it is drawn anew after each; what comes last may be words
            if bar:
                print(bar, end='\r', file=sys.stderr, flush=True)
    if process.returncode or not archive.is_file():
        said = ' '.join(said.split('\r')[-1].split())
        known = [reason for words, reason in REASONS.items() if words in said.lower()]
        raise UserError((known or [f'the kaggle client failed ({said[-300:]})'])[0] + by_hand)


def unpack(archive, folder, inside=''):
    """A zip file, and train.zip and test.zip in it, which belong into folders of these names."""
    with zipfile.ZipFile(archive) as opened:
        for entry in progress_bar(opened.infolist(), desc=f'unpacking {inside}', unit='file'):
            name = Path(entry.filename)
            if name.is_absolute() or '..' in name.parts:
                raise UserError(f'{archive} has an entry that leads out of its folder ({name}): it is not from Kaggle, delete it')
            if entry.filename in ('train.zip', 'test.zip'):
                with opened.open(entry) as file:
                    unpack(file, folder, name.stem)
            else:
                opened.extract(entry, folder if name.parts[0] == inside else folder / inside)


@exit_clearly
def main(argv, parts=PARTS):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', type=Path, default='data', help='where it goes (default: %(default)s)')
    folder = parser.parse_args(argv).data_dir
    fetched = fetch(folder, parts)
    print(f'{folder} is complete: {parts["train"]:,} training and {parts["test"]:,} test photographs'
          + (f'; {folder / NAME}.zip is no longer needed' if fetched else ''))


if __name__ == '__main__':
    main(sys.argv[1:])
