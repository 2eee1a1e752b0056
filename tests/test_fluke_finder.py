"""The fluke finder: what it learns from, that it learns, and that it writes whole files and never over the user's own."""
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import fluke_finder as benchmark
from data.tables import BOX
from data.wild_photographs import draw_wild
from models import finder_net, fluke_finder
from tests.conftest import arguments
from tests.conftest import snapshot as contents
from utils.errors import UserError

QUICK = dict(photographs=4, iterations=2, batch_size=2, height=32, width=64, threads=1, precision='fp32', device='cpu', run='f')


def constants(**changes):
    values = {name: getattr(fluke_finder, name) for name in fluke_finder.RULES}
    return SimpleNamespace(**{**values, **QUICK, **changes})


def ellipse(rng, height=60, width=120):
    """A light ellipse on a dark ground, its mask and box."""
    mask = np.zeros((height, width), np.uint8)
    centre, axes = rng.integers([40, 25], [80, 35]).tolist(), rng.integers([15, 8], [35, 20]).tolist()
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, -1)
    image = np.uint8(60 + 120 * mask[..., None] + rng.integers(0, 30, (height, width, 3)))
    return image, mask, finder_net.box_of(mask)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six photographs in three folders, the first with the user's box, the second with the user's mask."""
    monkeypatch.chdir(tmp_path)
    rng, data = np.random.default_rng(0), tmp_path / 'mine'
    (data / 'train').mkdir(parents=True)
    (data / 'train/.DS_Store').touch()
    for number, part in enumerate(['train'] * 3 + ['test'] * 2 + ['playground/train']):
        (data / part).mkdir(parents=True, exist_ok=True)
        image, mask, _ = ellipse(rng)
        cv2.imwrite(str(data / part / f'{number}.png'), image)
        if number == 1:
            (data / 'masks').mkdir()
            cv2.imwrite(str(data / 'masks/1.png'), mask * 255)
    (data / 'bboxes.csv').write_text('Image,x0,y0,x1,y1,by\n0.png,10,5,100.5,50,me\nelsewhere.jpg,1,2,3,4,me\n')
    return data


def answers(monkeypatch, confidence=0.9, shift=0):
    """The network answers with a fixed box and a mask that is somewhat smaller."""
    def find(net, image, height, width):
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[22:38, 32 + shift:88 + shift] = 1
        return np.array([30 + shift, 20, 90 + shift, 40]), mask, confidence
    monkeypatch.setattr(fluke_finder, 'find', find)
    monkeypatch.setattr(fluke_finder, 'plot_found', lambda *_: None)  # slower than the rest


def run(data, **changes):
    settings = {**QUICK, **changes}
    try:
        fluke_finder.main(arguments(data_dir=data, **settings))
    except SystemExit as stop:
        return stop.code
    return 0


# ---- what it writes --------------------------------------------------------------------------------------------------

def test_a_run_writes_boxes_masks_and_a_sheet(folder, capsys):
    assert run(folder) == 0
    table = pd.read_csv(folder / 'fluke_finder.csv')
    assert table['Image'].tolist() == [f'{n}.png' for n in range(6)] and table['confidence'].between(0, 1).all()
    assert {path.name for path in (folder.parent / 'results/f').iterdir()} == {'weights.pth', 'found.png'}
    assert 'photographs keep the whole frame' in capsys.readouterr().out


def test_what_the_user_gave_stays(folder, monkeypatch):
    answers(monkeypatch)
    given, before = (folder / 'bboxes.csv').read_text(), (folder / 'masks/1.png').read_bytes()
    assert run(folder) == 0
    boxes = pd.read_csv(folder / 'bboxes.csv').set_index('Image')
    assert (folder / 'bboxes.csv').read_text().startswith(given)
    assert (folder / 'masks/1.png').read_bytes() == before
    mask = cv2.imread(str(folder / 'masks/1.png'), cv2.IMREAD_UNCHANGED) > 0
    assert boxes.loc['1.png', BOX].tolist() == finder_net.box_of(np.uint8(mask)).tolist()  # its mask knows better
    assert boxes.loc['5.png', BOX].tolist() == [30, 20, 90, 40] and len(boxes) == 7
    found = cv2.imread(str(folder / 'masks/5.png'), cv2.IMREAD_UNCHANGED)
    assert found.shape == (60, 120) and found.max() == 255 and found[22:38, 32:88].all() and found.sum() == 255 * 16 * 56
    assert cv2.imread(str(folder / 'masks/0.png'), cv2.IMREAD_UNCHANGED).any()  # a given box gets a mask
    assert [path.name for path in folder.rglob('.*')] == ['.DS_Store']


def test_a_mask_stays_within_the_given_box(folder, monkeypatch):
    answers(monkeypatch)
    (folder / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\n0.png,40,25,200,30\n')
    run(folder)
    mask = cv2.imread(str(folder / 'masks/0.png'), cv2.IMREAD_UNCHANGED)
    assert finder_net.box_of(mask).tolist() == [40, 25, 88, 30]


def test_uncertain_photographs_keep_the_whole_frame(folder, monkeypatch, capsys):
    answers(monkeypatch, confidence=0.3)
    run(folder)
    assert pd.read_csv(folder / 'bboxes.csv')['Image'].tolist() == ['0.png', 'elsewhere.jpg', '1.png']
    assert [path.name for path in (folder / 'masks').iterdir()] == ['1.png']
    out = capsys.readouterr().out
    assert '4 of 6 photographs keep' in out and ': 2.png, 3.png, 4.png, 5.png' in out


def test_its_own_files_are_written_anew_and_never_learned_from(folder, monkeypatch):
    answers(monkeypatch)
    run(folder)
    first = contents(folder)
    frame = fluke_finder.list_photographs(folder)
    assert frame['our_box'].tolist() == [False] + 5 * [True] and frame['our_mask'].tolist() == [True, False] + 4 * [True]
    assert frame['x0'].notna().sum() == 1 and frame['has_mask'].tolist() == [False, True] + 4 * [False]
    run(folder)
    assert contents(folder) == first
    answers(monkeypatch, confidence=0.2)
    run(folder)
    assert pd.read_csv(folder / 'bboxes.csv')['Image'].tolist() == ['0.png', 'elsewhere.jpg', '1.png']
    assert [path.name for path in (folder / 'masks').iterdir()] == ['1.png']


def test_what_the_user_mended_is_the_users(folder, monkeypatch):
    answers(monkeypatch)
    run(folder)
    boxes = pd.read_csv(folder / 'bboxes.csv')
    boxes.loc[boxes['Image'] == '3.png', 'x1'] = 95
    boxes.to_csv(folder / 'bboxes.csv', index=False)
    cv2.imwrite(str(folder / 'masks/4.png'), np.full((60, 120), 255, np.uint8))
    frame = fluke_finder.list_photographs(folder)
    assert not frame['our_box'][3] and frame['x1'][3] == 95 and not frame['our_mask'][4] and frame['has_mask'][4]
    run(folder)
    assert pd.read_csv(folder / 'bboxes.csv').set_index('Image')['x1']['3.png'] == 95
    assert cv2.imread(str(folder / 'masks/4.png'), cv2.IMREAD_UNCHANGED).all()


def test_photographs_that_were_away_for_a_run_are_still_its_own(folder, monkeypatch):
    answers(monkeypatch)
    run(folder)
    away = folder / 'playground/train/5.png'
    content = away.read_bytes()
    away.unlink()
    run(folder)
    away.write_bytes(content)
    frame = fluke_finder.list_photographs(folder).set_index('Image')
    assert frame.loc['5.png', 'our_box'] and frame.loc['5.png', 'our_mask']


def test_photographs_whose_masks_would_share_a_name_are_refused(folder):
    (folder / 'test').mkdir(exist_ok=True)
    (folder / 'train' / '0.json').write_text('a note of another program')
    assert '0.json' in set(fluke_finder.list_photographs(folder)['Image'])
    (folder / 'test' / '0.jpg').write_bytes((folder / 'train' / '0.png').read_bytes())
    with pytest.raises(UserError, match='share a name .0.png, 0.jpg.'):
        fluke_finder.list_photographs(folder)


def test_the_sample_is_drawn_when_absent(folder, monkeypatch):
    answers(monkeypatch)
    monkeypatch.setattr(fluke_finder, 'draw_sample', lambda out: (out.parent.mkdir(), folder.rename(out)))
    assert run('data/sample') == 0
    assert (folder.parent / 'data/sample/fluke_finder.csv').is_file()


@pytest.mark.parametrize('again', [False, True])
def test_killed_at_any_write(folder, monkeypatch, again):
    """Whatever was written until then: nothing half-written, and nothing that the next run takes for the user's."""
    answers(monkeypatch)
    if again:
        run(folder)
        answers(monkeypatch, shift=5)  # other boxes, other masks
    net, c = finder_net.FlukeFinder(), constants()
    real, last = fluke_finder.write_whole, 0

    class Killed(BaseException):
        pass

    for last in range(12):
        calls = []

        def write(path, fill):
            calls.append(path)
            if len(calls) > last:
                raise Killed
            real(path, fill)

        frame = fluke_finder.list_photographs(folder)
        found, _ = fluke_finder.search(net, frame, c)
        monkeypatch.setattr(fluke_finder, 'write_whole', write)
        try:
            fluke_finder.publish(frame, found, folder)
            break
        except Killed:
            pass
        after = fluke_finder.list_photographs(folder)
        assert after['x0'].notna().tolist() == [True] + 5 * [False]
        assert after['has_mask'].tolist() == [False, True] + 4 * [False]
    assert 6 <= last <= 9 and len(pd.read_csv(folder / 'bboxes.csv')) == 7


# ---- what it learns from ---------------------------------------------------------------------------------------------

def test_learns_from_what_is_given(folder, monkeypatch):
    def collect(**changes):
        real, seen = fluke_finder.collect, []
        monkeypatch.setattr(fluke_finder, 'collect', lambda known, c: seen.append(real(known, c)) or seen[0])
        assert run(folder, **changes) == 0
        monkeypatch.setattr(fluke_finder, 'collect', real)
        return seen[0]

    answers(monkeypatch)
    drawn, given = collect()
    assert len(drawn) == 4 and [item[3] for item in drawn] == 4 * [True]
    assert sorted(item[3] for item in given) == [False, True]  # one box, one mask
    box = next(item[2] for item in given if not item[3])
    np.testing.assert_allclose(box, [10 / 60 - 1, 5 / 30 - 1, 100.5 / 60 - 1, 50 / 30 - 1], rtol=1e-5)
    assert [len(part) for part in collect(train_on='drawn')] == [4, 0]
    assert [len(part) for part in collect(train_on='given')] == [0, 2]


@pytest.mark.parametrize('known', ['mask', 'box'])
def test_learns_to_find(known):
    """Ellipses, by their masks or by their boxes alone: new ones are found, box and mask."""
    rng, c = np.random.default_rng(0), constants(iterations=90, batch_size=8, height=32, width=64, lr=0.01)
    learned = [fluke_finder.prepare(image, mask if known == 'mask' else None, None if known == 'mask' else box, c)
               for image, mask, box in (ellipse(rng) for _ in range(40))]
    net = fluke_finder.train(c, [[], learned]).eval()
    boxes, masks = [], []
    for _ in range(12):
        image, mask, box = ellipse(rng)
        found, found_mask, confidence = finder_net.find(net, image, 32, 64)
        boxes.append(finder_net.iou(found, box))
        masks.append((mask & found_mask).sum() / (mask | found_mask).sum())
    assert np.mean(boxes) > 0.7 and np.mean(masks) > (0.75 if known == 'mask' else 0.5)


def test_targets_follow_the_augmentation():
    """In a batch, the box is still that around the mask."""
    rng, c = np.random.default_rng(0), constants(height=64, width=128)
    torch.manual_seed(0)
    items = [fluke_finder.prepare(image, mask, None, c) for image, mask, _ in (ellipse(rng) for _ in range(16))]
    images, mask, columns, rows, has_mask = fluke_finder.batch(items, c)
    assert images.shape == (16, 3, 64, 128) and has_mask.all() and 0 <= images.min() and images.max() <= 1
    assert ((mask.amax(1) - columns).abs().sum(1) <= 4).all() and ((mask.amax(2) - rows).abs().sum(1) <= 4).all()
    assert len(columns.unique(dim=0)) > 10
    light = (images.mean(1) * mask).sum((1, 2)) / mask.sum((1, 2)) > images.mean((1, 2, 3))
    assert light.all()  # the mask lies on the ellipse


def test_mirrored_but_not_upside_down():
    c, ramp = constants(height=64, width=128), np.arange(0, 240, 2, np.uint8)
    box, ways = [0, 0, 120, 60], []
    for image in (np.tile(ramp[:, None], (60, 1, 3)), np.tile(ramp[::2, None, None], (1, 120, 3))):
        torch.manual_seed(0)
        images = fluke_finder.batch([fluke_finder.prepare(image, None, box, c)] * 16, c)[0].mean(1)  # (16, 64, 128)
        ways.append([(images[:, :, 64:].mean((1, 2)) > images[:, :, :64].mean((1, 2))).sum().item(),
                     (images[:, 32:].mean((1, 2)) > images[:, :32].mean((1, 2))).sum().item()])
    assert 3 <= ways[0][0] <= 13 and ways[1][1] == 16


def test_weights_are_used_again_when_they_fit(folder, monkeypatch, capsys):
    answers(monkeypatch)
    calls = []
    monkeypatch.setattr(fluke_finder, 'train', lambda c, pools: calls.append(1) or finder_net.FlukeFinder())
    run(folder), run(folder)
    assert len(calls) == 1 and 'no training' in capsys.readouterr().out
    run(folder, seed=1)
    assert len(calls) == 2
    (folder / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\n0.png,10,5,99,50\n')
    run(folder, seed=1)
    assert len(calls) == 3
    cv2.imwrite(str(folder / 'masks/1.png'), np.full((60, 120), 255, np.uint8))
    run(folder, seed=1)
    assert len(calls) == 4
    run(folder, train_on='drawn')
    (folder / 'test/4.png').rename(folder / 'test/9.png')
    theirs = folder.rename(folder.parent / 'theirs')
    run(theirs, train_on='drawn')
    assert len(calls) == 5  # what was drawn serves any folder
    (theirs / 'bboxes.csv').unlink(), (theirs / 'masks/1.png').unlink(), run(theirs)
    (theirs / 'test/9.png').rename(theirs / 'test/10.png'), run(theirs)
    assert len(calls) == 6  # and so it does where nothing is given


# ---- its parts -------------------------------------------------------------------------------------------------------

def test_longest_is_the_interval_with_the_largest_sum():
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.normal(size=13)
        best = max((logits[a:b].sum(), a / 13, b / 13) for a in range(13) for b in range(a + 1, 14))
        assert finder_net.longest(torch.tensor(logits)) == pytest.approx(best[1:])


def test_the_weak_loss_wants_the_box_filled_and_nothing_outside():
    columns, rows = torch.zeros(1, 16), torch.zeros(1, 8)
    columns[:, 4:12], rows[:, 2:6] = 1, 1
    edges = columns * 20 - 10, rows * 20 - 10

    def loss(mask, truth=None):
        known = torch.tensor([truth is not None])
        return finder_net.finder_loss((mask * 20 - 10, *edges), mask if truth is None else truth, columns, rows, known).item()

    full, cross, half, outside, corner = torch.zeros(5, 1, 8, 16)
    full[:, 2:6, 4:12] = 1
    cross[:, 2:6, 7], cross[:, 3, 4:12] = 1, 1
    half[:, 2:6, 4:8] = 1
    outside[:, 2:7, 4:14] = 1
    assert loss(full) < 0.01 and loss(cross) < 0.01  # the box cannot tell these apart
    corner[:] = full
    corner[:, 6, 12] = 1
    assert loss(half) > 0.1 and loss(outside) > 0.1 and loss(corner) > 0.2
    assert loss(cross, truth=full) > 1 and loss(cross, truth=cross) < 0.01  # a mask can


def test_iou():
    assert finder_net.iou(np.array([0, 0, 4, 2]), np.array([2, 0, 6, 2])) == pytest.approx(1 / 3)
    assert finder_net.iou(np.array([0, 0, 1, 1]), np.array([2, 2, 3, 3])) == 0
    assert finder_net.iou(np.zeros(4), np.zeros(4)) == 0


def test_wild_photographs():
    drawn = [draw_wild(1, number) for number in range(12)]
    for (image, mask), (again, _) in zip(drawn, [draw_wild(1, 0)] + drawn[1:]):
        assert image.shape == (*mask.shape, 3) and set(np.unique(mask)) == {0, 255} and np.array_equal(image, again)
    assert len({mask.shape for _, mask in drawn}) > 5
    widths = [np.ptp(finder_net.box_of(mask)[[0, 2]]) / mask.shape[1] for _, mask in drawn]
    assert np.median(widths) > 0.8  # as in real photographs


# ---- the measurement, and mistakes ------------------------------------------------------------------------------------

def test_otsu_finds_dark_on_light_and_light_on_dark():
    image, mask, _ = ellipse(np.random.default_rng(0))
    for picture in (image, 255 - image):
        found = benchmark.otsu(picture)
        assert (found & mask).sum() / (found | mask).sum() > 0.95


def test_the_measurement(folder, monkeypatch):
    monkeypatch.setattr(benchmark, 'find', lambda net, image, *_: (np.array([10, 5, 55, 50]), benchmark.otsu(image), 0.5))
    table = benchmark.measure(folder / 'train', folder / 'bboxes.csv', folder / 'masks', None, 32, 64)
    table = table.set_index(['Image', 'method'])
    assert table['box']['0.png', 'fluke finder'] == pytest.approx(45 / 90.5)
    assert table['box']['0.png', 'whole frame'] == pytest.approx(90.5 * 45 / 7200)
    assert table['mask']['1.png', 'Otsu'] > 0.95 and table['box'].notna().sum() == table['mask'].notna().sum() == 3
    assert '2.png' not in table.index


def test_mistakes_are_one_sentence(folder, capsys):
    def said(**changes):
        assert run(changes.pop('data', folder), **changes) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
        assert len(lines) == 1
        return lines[0]

    (folder / 'empty').mkdir()
    assert 'has no photographs' in said(data=folder / 'empty')
    assert 'multiple of 32' in said(height=33)
    weights = folder.parent / 'results/f/weights.pth'
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b'rubbish')
    assert 'delete it and train again' in said()
    weights.unlink()
    (folder / 'bboxes.csv').unlink(), (folder / 'masks/1.png').unlink()
    assert 'no boxes and no masks' in said(train_on='given')
    (folder / 'train/2.png').write_bytes(b'rubbish')
    assert run(folder) == 0
    assert '2.png cannot be used' in capsys.readouterr().err
    assert pd.read_csv(folder / 'fluke_finder.csv')['confidence'][2] == 0
