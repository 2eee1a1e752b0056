"""Photographs of any animal -> the competition's layout, split into training and test: python -m data.adopt SOURCE

SOURCE is a folder with a folder for each animal (folders in those are encounters), or a CSV that lists photographs. Animals
called new_whale, unknown or nothing are those that nobody can name. No encounter is on both sides of the split.
"""
import argparse
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from data.decode import find_bad_images
from data.tables import BOX, NEW_WHALE, add_boxes, list_photographs, read_csv, refuse, refuse_names
from utils.errors import UserError, exit_clearly

COLUMNS = {  # the names that are looked for in a CSV, the first one first: letters only, in lower case
    'file': 'image file filename filepath imagepath path imagename photo photograph picture'.split(),
    'individual': 'individual individualid identity animal animalid whale whaleid id'.split(),
    'encounter': 'encounter encounterid sighting sightingid occurrence occurrenceid date'.split()}

DAY = r'(\d{4}[-:./]\d\d?[-:./]\d\d?|\d\d?[-./]\d\d?[-./]\d{4}|(?<!\d)(?:19|20)\d{6})'  # of a date, with or without the hour
SMALL = '--pretrained false --model_name seresnext14 --height 64 --width 128 --max_minutes 60'


def read_source(source, folder, given):
    """The photographs, the paths in a CSV counted from `folder`: a frame of Image, Id, path, encounter ('': unknown)."""
    if source.is_dir():
        table = list_photographs(source)
        parent = table['Image'].str.rpartition('/')[0]
        return table.assign(encounter=parent.where(parent.str.contains('/'), ''))
    if not source.is_file():
        raise UserError(f'{source} is not there: name a folder with a folder for each animal, or a CSV that lists photographs')
    table = read_csv(source, unique=False)
    plain, column = {re.sub('[^a-z]', '', name.lower()): name for name in reversed(table.columns)}, {}
    for role, words in COLUMNS.items():
        column[role] = given[role] or next((plain[word] for word in words if word in plain), '')
        if role == 'encounter' and not column[role]:  # such as `Date taken`
            like = [name for text, name in plain.items() if re.search('date|encounter|sighting|timestamp', text)]
            column[role] = (like or [''])[0]
        if column[role] not in table and (given[role] or role != 'encounter'):
            raise UserError(f'{source} has no column {given[role] or " or ".join(words)}: give --{role} the name of one of '
                            f'{", ".join(table.columns)[:200]}')
    print(f'{source}: {", ".join(f"{role} in column {name!r}" for role, name in column.items() if name)}')
    if not column['encounter']:
        print('no column of encounters: photographs of one day may come to both sides (--encounter)')
    image, name, encounter = (
        table[column[role]].str.strip() if column[role] else pd.Series('', table.index) for role in COLUMNS)
    day = encounter.str.extract(DAY)[0]
    if day.notna().sum() > (encounter != '').sum() / 2:  # an animal's day is an encounter, whatever the hour
        encounter = (name + ' ' + day.fillna(encounter)).where(encounter != '', '')
    image = image.str.replace('\\', '/')
    path = image.map(lambda name: str(folder / name))
    table = table.assign(Image=image, Id=name, path=path, encounter=encounter)[['Image', 'Id', 'path', 'encounter']]
    refuse(source, table, ~path.map(os.path.isfile), f'lists what is not in {folder}', 'name its folder with --photographs')
    refuse(source, table, path.duplicated(keep=False), 'lists a photograph twice', 'keep one row for each')
    return table


def rename(table, source):
    """Make the ids such that a submission can name them, and Image a bare name, unlike all others."""
    old = table['Id'].str.strip().str.normalize('NFC')  # accents are written in two ways
    new = old.str.replace(r'\s+', '_', regex=True)
    new = new.mask(new.str.lower().isin(['', 'unknown', NEW_WHALE]), NEW_WHALE)
    names = table.assign(old=old, new=new)[['old', 'new']][new != NEW_WHALE].drop_duplicates()
    alike = names['new'].str.casefold().duplicated(keep=False)
    refuse(source, names, alike, 'has ids that differ in capitals and spaces only', 'write one as the other, or rename it')
    spaced = names[names['old'] != names['new']]
    if len(spaced):
        print(f'{len(spaced)} ids contain spaces, which become _: {spaced["old"].iloc[0]!r} is now {spaced["new"].iloc[0]!r}')
    bare = table['Image'].str.replace(r'.*[/\\]', '', regex=True)
    shared = bare.str.lower().duplicated(keep=False)  # on some disks A.jpg and a.jpg are one file
    bare = bare.mask(shared, table['Image'].str.lstrip('./\\').str.replace(r'[/\\]+', '__', regex=True))
    refuse(source, table, bare.str.lower().duplicated(keep=False), 'has photographs of one name', 'rename them')
    table = table.assign(Id=new, Image=bare)
    refuse_names(source, table[['Image', 'Id']])
    return table.sort_values('Image')


def split(table, test_share, new_share, seed):
    """Which rows are the test's, boolean (rows,), and the ids that are held out of training.

    `new_share` of the ids with few photographs (two up to the median of such ids) are held out. Of the encounters of each
    other id, and of new_whale, `test_share` are the test's, rounded up or down by lot; one always stays in training.
    """
    rng = np.random.default_rng(seed)
    pairs = table[['Id', 'encounter']].drop_duplicates()
    seen_in, ids_in = (pairs.groupby(key)[of].agg(set) for key, of in (('Id', 'encounter'), ('encounter', 'Id')))
    count = table['Id'].value_counts().sort_index().drop(NEW_WHALE, errors='ignore')
    few = count[(count > 1) & (count <= count[count > 1].median())].index
    held: list[str] = []
    test: set[str] = set()
    for name in rng.permutation(few):
        others = set().union(*ids_in[list(seen_in[name])]).difference(held, [name])
        if len(held) < math.ceil(new_share * len(few)) and all(seen_in[other] - seen_in[name] - test for other in others):
            held.append(name)
            test |= seen_in[name]
    most = {name: min(int(test_share * len(seen) + rng.random()), len(seen) - 1) for name, seen in seen_in.items()}
    taken = Counter(name for encounter in test for name in ids_in[encounter])
    for encounter in rng.permutation(ids_in.index):
        if encounter not in test and all(taken[name] < most[name] for name in ids_in[encounter]):
            test.add(encounter)
            taken.update(ids_in[encounter])
    return table['encounter'].isin(test), held


def write_layout(table, to):
    """The new folder `to`, from Image, Id, path, BOX and `test`, boolean: there whole or not at all."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f'.{to.name}-') as temporary:
        folder = Path(temporary) / 'made'
        for side, csv, part in (('train', 'train', table[~table['test']]), ('test', 'test_labels', table[table['test']])):
            (folder / side).mkdir(parents=True)
            for path, name in zip(part['path'], part['Image']):
                try:
                    os.link(os.path.realpath(path), folder / side / name)
                except OSError:  # another disk, or someone else's file
                    shutil.copyfile(path, folder / side / name)
            part[['Image', 'Id']].to_csv(folder / f'{csv}.csv', index=False)
        ids = sorted(set(table['Id'][~table['test']]) - {NEW_WHALE})
        part[['Image']].assign(Id=' '.join([NEW_WHALE, *ids[:4]])).to_csv(folder / 'sample_submission.csv', index=False)
        if table['x0'].notna().any():
            table.dropna(subset=BOX)[['Image', *BOX]].to_csv(folder / 'bboxes.csv', index=False)
        os.replace(folder, to)


def adopt(source, to, photographs, test_share, new_share, seed, **columns):
    source, to = Path(source), Path(to)
    if to.exists():
        raise UserError(f'{to} is there already: remove it, or choose another folder with --to')
    if not (0 < test_share <= 0.5 and 0 <= new_share <= 0.5):
        raise UserError('--test_share must be above 0, --new_share 0 or more, and both 0.5 at most')
    beside = source if source.is_dir() else source.parent
    table = read_source(source, Path(photographs or beside), columns)
    table['encounter'] = table['encounter'].mask(table['encounter'] == '', table['Image'])
    add_boxes((table,), beside / 'bboxes.csv', [])
    if (beside / 'bboxes.csv').is_file():
        print(f'bboxes.csv has boxes of {table["x0"].notna().sum()} of the {len(table)} photographs')
    loose = [path.name for path in source.iterdir() if path.is_file() and path.suffix != '.csv'] if source.is_dir() else []
    if loose:
        print(f'left out: {len(loose)} files that are in no folder of an animal, such as {loose[0]}')
    bad = find_bad_images(list(table['path']))
    for path, reason in bad.items():
        print(UserError(f'left out: {path} ({reason})'))  # which shows any name
    table = rename(table[~table['path'].isin(bad)], source)
    table['test'], held = split(table, test_share, new_share, seed)
    if not (table['Id'][~table['test']] == NEW_WHALE).any():  # validation needs some, too: half of those that are held out
        back = table['Id'].isin(held[1::2])
        table['test'] &= ~back | table['encounter'].isin(table['encounter'][~back])
    count = table['Id'][~table['test']].value_counts().drop(NEW_WHALE, errors='ignore')
    if not table['test'].any() or (count > 1).sum() < 3:
        raise UserError(f'{source} gives {table["test"].sum()} test photographs, and {(count > 1).sum()} ids with two or more in '
                        'training, where three are needed: add photographs, or change --test_share and --new_share')
    table.loc[table['Id'].isin(held), 'Id'] = NEW_WHALE
    try:
        write_layout(table, to)
    except OSError as error:
        raise UserError(f'{to} cannot be written ({error.strerror}); nothing is left of it') from error
    new = table['test'][table['Id'] == NEW_WHALE]
    # the first stage takes ids with ten photographs outside validation; where they are too few for a batch, it takes all
    total, often = (len(table) - table['test'].sum()) * 2 // 3, count[count > 10].sum() * 2 // 3
    schedule = '' if often >= 48 else ' --schedule "[(0, False, 3e-4), (0, True, 3e-4), (0, True, 3e-5)]"'
    batch = '' if total >= 48 else f' --batch_size {max(8, total // 4 * 4)}'
    folder, run = shlex.quote(str(to)), shlex.quote(to.name)
    print(f'{to}: {len(table)} photographs; {len(bad)} more could not be read\n'
          f'  train: {count.sum()} of {len(count)} ids, and {(~new).sum()} of {NEW_WHALE}\n'
          f'  test: {table["test"].sum() - new.sum()} of ids in training, and {new.sum()} of {NEW_WHALE}, with '
          f'{len(held)} held out ({" ".join(held[:3])}{" ..." if len(held) > 3 else ""})\n'
          f'next:\n  python train.py --data_dir {folder} --run {run} --stages all{schedule}{batch}\n'
          f'    (without a GPU: {SMALL})\n'
          f'  python test.py --data_dir {folder} --run {run}\n'
          f'  python -m utils.metrics results/{run}/submission.csv {folder}/test_labels.csv')


@exit_clearly
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='folder of folders, or CSV')
    parser.add_argument('--to', default='data/mine', help='folder to make (default: %(default)s)')
    parser.add_argument('--photographs', help='folder that the paths in the CSV are counted from (default: its own)')
    for role, words in COLUMNS.items():
        parser.add_argument(f'--{role}', help=f'its column in the CSV (default: the first of {", ".join(words)})')
    parser.add_argument('--test_share', type=float, default=0.2, help='of the encounters of each id (default: %(default)s)')
    parser.add_argument('--new_share', type=float, default=0.1, help='of the ids with few photographs: the test\'s new_whale '
                        '(default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed, another split (default: 0)')
    adopt(**vars(parser.parse_args(argv)))


if __name__ == '__main__':
    main(sys.argv[1:])
