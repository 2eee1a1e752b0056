"""data.kaggle against stand-ins for the `kaggle` client, which say and leave what versions 1.5 to 2.2 of it do."""
import io
import os
import sys
import zipfile

import pandas as pd
import pytest

from data import kaggle
from tests.conftest import assert_refused, run_main, snapshot

PARTS = {'train': 3, 'test': 2, 'train.csv': 3, 'sample_submission.csv': 2}
TABLES = {'train.csv': 'Image,Id\na.jpg,w_1\nb.jpg,w_1\nc.jpg,new_whale\n',
          'sample_submission.csv': 'Image,Id\nd.jpg,new_whale\ne.jpg,new_whale\n'}
PHOTOGRAPHS = {f'{side}/{name}.jpg': name * 5000 for side, names in (('train', 'abc'), ('test', 'de')) for name in names}
AUTH_HELP = 'Authentication required to call the Kaggle API.\n\n  https://www.kaggle.com/settings/api'
OLD_LOGIN = 'Traceback (most recent call last):\nOSError: Could not find kaggle.json. Make sure it is located in /root/.kaggle.'
READABLE = "Warning: Your Kaggle API key is readable by other users on this system! chmod 600 /root/.kaggle/kaggle.json\n"


def zipped(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def nested():
    """As Kaggle once gave it: a zip of photographs in the zip."""
    sides = {side: {name.split('/')[1]: text for name, text in PHOTOGRAPHS.items() if name.startswith(side)}
             for side in ('train', 'test')}
    return zipped({**TABLES, **{f'{side}.zip': zipped(files) for side, files in sides.items()}})


WHOLE = zipped({**TABLES, **PHOTOGRAPHS})


@pytest.fixture
def client(tmp_path, monkeypatch):
    """client(archive, says, code) puts a `kaggle` on the PATH; `tmp_path/calls` has a line for each time it ran."""
    (tmp_path / 'bin').mkdir()
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python'))
    python = os.path.realpath(f'/proc/{os.getpid()}/exe')

    def install(archive=None, says='', code=0):
        (tmp_path / 'archive').write_bytes(archive or b'')
        path = tmp_path / 'bin/kaggle'
        path.write_text(f'''#!{python}
import shutil, sys
open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')
sys.stderr.write('  0%|     | 0.00/5.28G\\r 50%|##   | 2.64G/5.28G\\r')
print({says!r}, file=sys.stderr)
if {archive is not None}:
    shutil.copy({str(tmp_path / 'archive')!r}, sys.argv[sys.argv.index('-p') + 1] + '/humpback-whale-identification.zip')
sys.exit({code})
''')
        path.chmod(0o755)
    return install


@pytest.fixture
def fetch(tmp_path, capsys):
    return lambda: run_main(kaggle.main, ['--data_dir', str(tmp_path / 'data')], capsys, parts=PARTS)


def parts_of(folder):
    return {name: content.decode() for name, content in snapshot(folder).items() if not name.endswith('.zip')}


@pytest.mark.parametrize('archive', [WHOLE, nested()], ids=['flat', 'zips in the zip'])
def test_the_data_is_fetched_once_and_beside_what_is_there(client, fetch, tmp_path, archive):
    client(archive)
    own = {'bboxes.csv': 'mine', 'masks/a.png': 'mine', 'pseudo_labels.csv': 'mine', 'train.csv': TABLES['train.csv'] + '\n'}
    for name, text in own.items():
        (tmp_path / 'data' / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / 'data' / name).write_text(text)
    first = fetch()
    assert first.code == 0 and '3 training and 2 test photographs' in first.out and '50%' in first.err
    assert parts_of(tmp_path / 'data') == {**TABLES, **PHOTOGRAPHS, **own}
    assert (tmp_path / 'calls').read_text() == f'competitions download -c humpback-whale-identification -p {tmp_path / "data"}\n'
    (tmp_path / 'data/humpback-whale-identification.zip').unlink()
    again = fetch()
    assert again.code == 0 and 'complete' in again.out and 'longer' not in again.out
    assert len((tmp_path / 'calls').read_text().splitlines()) == 1


def test_an_archive_that_was_downloaded_by_hand_needs_no_client(fetch, client, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/humpback-whale-identification.zip').write_bytes(WHOLE)
    assert fetch().code == 0 and parts_of(tmp_path / 'data') == {**TABLES, **PHOTOGRAPHS}


FAILURES = {
    'no credentials': (dict(says=AUTH_HELP, code=1), ['token', 'KAGGLE_API_TOKEN']),
    'no credentials, old': (dict(says=OLD_LOGIN, code=1), ['token', '~/.kaggle/kaggle.json']),
    'wrong credentials': (dict(says='401 - Unauthorized', code=1), ['token']),
    'rules': (dict(says='403 - Forbidden - You must accept this competition\'s rules', code=1), ['accept the rules', '/rules']),
    'rules, readable key': (dict(says=READABLE + '403 Client Error: Forbidden for url: x', code=1), ['accept the rules']),
    'full disk': (dict(says='[Errno 28] No space left on device', code=1), ['disk is full']),
    'no network': (dict(says=READABLE + 'HTTPSConnectionPool: Max retries exceeded', code=1), ['Max retries exceeded']),
    'network lost': (dict(archive=WHOLE[:-400], says='Connection broken', code=1), ['Connection broken']),
    'stopped': (dict(says='User cancelled operation', code=0), ['User cancelled operation']),
    'cut off': (dict(archive=WHOLE[:-400]), ['cut off or broken', 'delete it']),
    'damaged': (dict(archive=WHOLE.replace(WHOLE[80:90], b'..........')), ['cut off or broken', 'delete it']),
    'zip in it cut off': (dict(archive=zipped({**TABLES, **PHOTOGRAPHS, 'train.zip': WHOLE[:-400]})), ['cut off or broken']),
    'leads out': (dict(archive=zipped({**TABLES, **PHOTOGRAPHS, '../out.txt': 'x'})), ['leads out of its folder', '../out.txt']),
    'other counts': (dict(archive=zipped({**TABLES, 'train/a.jpg': 'a'})), ['not the data', "'train': 1"]),
}


@pytest.mark.parametrize('behaviour, words', FAILURES.values(), ids=FAILURES)
def test_a_failure_is_one_sentence_and_leaves_nothing_but_the_archive(client, fetch, tmp_path, behaviour, words):
    client(**behaviour)
    assert_refused(fetch(), *words)
    assert parts_of(tmp_path / 'data') == {} and sorted(os.listdir(tmp_path)) == ['archive', 'bin', 'calls', 'data']
    assert [name for name in os.listdir(tmp_path / 'data') if not name.endswith('.zip')] == []


def test_without_the_client_the_sentence_says_where_the_data_is(fetch, client, tmp_path):
    assert_refused(fetch(), 'pip install kaggle', 'https://www.kaggle.com/c/humpback-whale-identification/data',
                   str(tmp_path / 'data'))


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(client, fetch, tmp_path, monkeypatch):
    def extract(self, entry, folder, real=zipfile.ZipFile.extract):
        if entry.filename == 'test/d.jpg':
            raise OSError(28, 'No space left on device')
        return real(self, entry, folder)
    monkeypatch.setattr(zipfile.ZipFile, 'extract', extract)
    client(WHOLE)
    assert_refused(fetch(), 'cannot be unpacked', 'No space left')
    assert os.listdir(tmp_path / 'data') == ['humpback-whale-identification.zip']


def test_half_of_the_data_is_neither_taken_for_the_whole_nor_touched(client, fetch, tmp_path):
    client(WHOLE)
    (tmp_path / 'data/train').mkdir(parents=True)
    (tmp_path / 'data/train/a.jpg').write_text('mine')
    assert_refused(fetch(), 'train: 1 in place of 3')
    assert snapshot(tmp_path / 'data') == {'train/a.jpg': b'mine'} and not (tmp_path / 'calls').exists()


def test_the_real_counts_are_those_of_the_competition():
    assert kaggle.PARTS == dict(zip(PARTS, (25361, 7960, 25361, 7960))) and pd.Series(kaggle.PARTS)[:2].sum() == 33321
