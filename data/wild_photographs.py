"""Draws flukes as odd as real photographs are, for the fluke finder alone: the sample's photographs, which ask who it is, are
tamer. The framing follows the boxes that people drew around the flukes of the competition."""
import cv2
import numpy as np

from data.make_sample import cut_at_water, develop, draw_animal, draw_photograph, draw_view, noise, smoothstep

width = 320     # pixels; the height follows from fluke and framing


def draw_wild(seed, number, animals=60):
    """Photograph `number`, of one of `animals` flukes: image (H, W, 3) uint8 RGB and mask (H, W) uint8 0/255."""
    rng = np.random.default_rng([seed, 3, number])  # the fourth stream; the sample has three
    fluke = draw_animal(seed, number % animals, animals)
    image, mask = draw_photograph(rng, fluke, place_wildly, lambda rng, image: image)
    cover = cv2.GaussianBlur(np.float32(mask / 255), (0, 0), 0.7)[..., None]
    image = change_surroundings(rng, image, cover)
    image = develop(rng, image)
    image = copy_badly(rng, image) if rng.random() < 0.25 else image
    image, mask = add_border(rng, image, mask) if rng.random() < 0.2 else (image, mask)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 91))]
    return cv2.imdecode(cv2.imencode('.jpg', image, quality)[1], cv2.IMREAD_COLOR), mask


def place_wildly(rng, cover):
    """Like data.make_sample.place_fluke: steeper poses, and frames as tight as those of real photographs."""
    flat, fullness = draw_view(rng, rng.uniform(0.5, 3)), rng.uniform(-0.1, 0.5)

    def view(x, y):
        return flat(x * (1 + fullness * (1 - np.minimum(np.abs(x), 1))), y)     # broader towards the tips

    x0, x1, y0, y1, water = cut_at_water(rng, cover, view)
    if rng.random() < 0.4:      # the tail stock too is out of the water
        water += rng.exponential(0.25)
        y1 = water
    # Of 35,095 real boxes half are wider than 95% of the photograph; heights are spread evenly from 30% on.
    left, right = rng.uniform(0, 0.35, 2) if rng.random() < 0.2 else rng.exponential(0.025, 2)
    if rng.random() < 0.12:     # a lobe is cut off by the frame
        left, right = rng.permutation([-rng.uniform(0, 0.35), right])
    share = rng.uniform(0.25, 1.02)
    scale = width * (1 - left - right) / (x1 - x0)
    height = int(np.clip(scale * (y1 - y0) / share, width / 7, width))
    top = (height - scale * (y1 - y0)) * np.clip(rng.normal(0.45, 0.13), 0, 1)
    return height, width, view, scale, left * width - scale * x0, top - scale * y0, top + scale * (water - y0)


def change_surroundings(rng, image, cover):
    """Land, cloud or mist above a line, blown-out or dark sea, spray, other dark and light patches; all behind the fluke."""
    height = len(image)
    behind, y = image.copy(), np.arange(height)[:, None]
    if rng.random() < 0.3:      # a shore, or a hill in the distance
        coarse = sum(s * noise(rng, height, width, height / k, width / k) for k, s in [(3, 0.4), (9, 0.5), (40, 0.5)])
        land = rng.uniform(0.1, 0.9) + rng.normal(0, 0.04, 3) + rng.uniform(0.02, 0.2) * coarse[..., None]
        line = height * (rng.uniform(0.0, 0.7) + 0.08 * noise(rng, 1, width, 2, rng.uniform(2, 8)) * rng.integers(0, 2))
        above = smoothstep(line - y, -1, 1)[..., None]
        behind = behind * (1 - above) + land * above
    if rng.random() < 0.35:     # rough or flat light on the water
        behind = behind.mean() + rng.uniform(0.1, 2.5) * (behind - behind.mean()) + rng.normal(0, 0.25)
    for _ in range(rng.poisson(0.6)):   # white water, shadows, backs of other whales
        x, yy, r = rng.uniform(0, width), rng.uniform(0.4, 1) * height, rng.uniform(0.05, 0.3) * width
        across, down = np.meshgrid((np.arange(width) - x) / r, (np.arange(height) - yy) / r * rng.uniform(1, 5))
        ragged = 0.5 * noise(rng, height, width, height / 6, width / 9) + 0.5 * noise(rng, height, width, 4, 9)
        patch = smoothstep(1 - np.hypot(across, down) + 0.5 * ragged, 0, rng.uniform(0.1, 0.9))[..., None]
        behind = behind * (1 - patch) + rng.choice([0.08, 0.5, 0.95]) * patch
    return behind * (1 - cover) + image * cover


def copy_badly(rng, image):
    """A print, copied and scanned: grey, hard, nearly black and white."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    middle = np.quantile(grey, rng.uniform(0.2, 0.7))
    hard = 255 / (1 + np.exp((middle - grey) / rng.uniform(4, 40)))
    return np.repeat(np.uint8(hard)[..., None], 3, 2)


def add_border(rng, image, mask):
    """A white or dark margin with a written line, as on catalogue cards; sometimes the print lies askew on it."""
    height = len(image)
    top, left, right = rng.integers(0, 12, 3) * rng.integers(0, 2, 3)
    bottom = int(rng.uniform(0.05, 0.5) * height)
    paper = 255 if rng.random() < 0.85 else 0
    if rng.random() < 0.3:
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.normal(0, 6), rng.uniform(0.75, 1))
        image = cv2.warpAffine(image, turn, (width, height), borderValue=(paper,) * 3)
        mask = cv2.warpAffine(mask, turn, (width, height), flags=cv2.INTER_NEAREST)
    image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(paper,) * 3)
    for row in range(rng.integers(0, 3)):
        text = ''.join(rng.choice(list('ABCDEFGHKLMNOPRSTUW #-/0123456789 acehinorst'), rng.integers(4, 26)))
        place = (int(rng.uniform(0, 0.5) * width), int(top + height + bottom * (0.4 + 0.4 * row)))
        cv2.putText(image, text, place, int(rng.integers(0, 8)), bottom / 90 + 0.2, (255 - paper,) * 3, 1, cv2.LINE_AA)
    return image, cv2.copyMakeBorder(mask, top, bottom, left, right, cv2.BORDER_CONSTANT, value=0)
