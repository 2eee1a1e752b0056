"""A name -> a feature extractor with a 4-channel stem: which there are, their ImageNet weights, what `freeze` freezes."""
import difflib
import math
import shutil
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import FTPHandler, HTTPHandler, build_opener

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters, senet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from utils.errors import UserError, raise_if_machines
from utils.files import sha256, sweep, write_whole

BACKBONES = {  # by their names in timm
    'senet154': 'legacy_senet154', 'seresnext101': 'legacy_seresnext101_32x4d', 'seresnext50': 'legacy_seresnext50_32x4d',
    'seresnet152': 'legacy_seresnet152', 'seresnet101': 'legacy_seresnet101', 'seresnet50': 'legacy_seresnet50',
    'seresnext26': 'legacy_seresnext26_32x4d', 'seresnext14': 'legacy_seresnext26_32x4d'}  # for a CPU; the last with [1, 1, 1, 1]
# ImageNet weights with RGB input. The hex digits at a name's end are the start of the file's SHA-256, which is checked.
# Two file names a backbone: timm's release, and pretrainedmodels' own (same keys), whose host is plain http: local only.
_MIRRORS = ['https://github.com/huggingface/pytorch-image-models/releases/download/{folder}/{name}',
            'https://github.com/rwightman/pytorch-image-models/releases/download/{folder}/{name}']
WEIGHTS = {
    'senet154': ('v0.1-weights', 'legacy_senet154-e9eb9fe6.pth', 'senet154-c7b49a05.pth'),
    'seresnext101': ('v0.1-weights', 'legacy_se_resnext101_32x4d-37725eac.pth', 'se_resnext101_32x4d-3b2fe3d8.pth'),
    'seresnext50': ('v0.1-weights', 'legacy_se_resnext50_32x4d-f3651bad.pth', 'se_resnext50_32x4d-a260b3a4.pth'),
    'seresnet50': ('v0.1-cadene', 'se_resnet50-ce0d4300.pth', 'se_resnet50-ce0d4300.pth'),
    'seresnet101': ('v0.1-cadene', 'se_resnet101-7e38fcc6.pth', 'se_resnet101-7e38fcc6.pth'),
    'seresnet152': ('v0.1-cadene', 'se_resnet152-d17c99b7.pth', 'se_resnet152-d17c99b7.pth'),
}
SILENCE = 60  # seconds without a byte until a mirror is given up
FROZEN_LAYERS = ('layer0', 'layer1', 'layer2')  # what `freeze` holds still in a SENet (the competition's first place)


def check_model_name(name):
    """The name, or a UserError that offers the nearest ones."""
    if name in BACKBONES or name.startswith('timm/') and timm.is_model(name[5:].split('.')[0]):
        return name
    near = difflib.get_close_matches(name, [*BACKBONES, *(f'timm/{other}' for other in timm.list_models())], n=3, cutoff=0.4)
    raise UserError(f"model_name = '{name}' is not known; " + (f"did you mean {' or '.join(near)}? " if near else '')
                    + f"There are {', '.join(BACKBONES)} and timm/NAME.")


def build_backbone(model_name, height=256, width=512):
    """A module from (B, 4, height, width), RGB normalised and a 0/1 mask, to a feature map (B, C, h, w); `.channels` is C.

    Weights are random: `load_imagenet` fills them. The stem's fourth input filter is zero, so that at first no mask
    changes the output of the three-channel network.
    """
    name = check_model_name(model_name)
    return TimmBackbone(name[5:], height, width) if name.startswith('timm/') else SENetBackbone(name)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; on a CPU the matrix product that it is, which on small maps is up to five times faster there."""

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1)[:, ::self.stride[0], ::self.stride[1]]  # (B, h, w, in); the gradient has this layout too
        # Flat rows: with four dimensions and no gradient torch copies the whole weight for every row of pixels.
        y = F.linear(x.reshape(-1, self.in_channels), self.weight.flatten(1), self.bias)  # (B * h * w, out)
        return y.view(*x.shape[:3], -1).permute(0, 3, 1, 2)  # (B, out, h, w), channels last


class Grouped(nn.Conv2d):
    """A grouped 3x3 convolution; in bf16 on a CPU its groups are joined, with zeros between, until 16 channels wide.

    More products, but such as the processor's matrix unit is made for: at 4 channels a group six times as fast.
    """

    def forward(self, x):
        width, joined = self.in_channels // self.groups, min(16 * self.groups // self.in_channels, self.groups)
        if x.dtype != torch.bfloat16 or x.is_cuda or joined < 2:
            return super().forward(x)
        weight = self.weight.view(-1, joined, self.out_channels // self.groups, 1, width, *self.kernel_size)
        wide = weight * torch.eye(joined, dtype=weight.dtype, device=x.device).view(1, joined, 1, joined, 1, 1, 1)
        return F.conv2d(x, wide.flatten(3, 4).flatten(0, 2), self.bias, self.stride, self.padding, self.dilation,
                        self.groups // joined)


class SqueezeExcite(senet.SEModule):
    """The same gate on each channel, pooled so that its gradient, too, lies channels last: other layouts add slowly."""

    def forward(self, x):
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h * w, C)
        pooled = (rows.new_ones(len(x), 1, rows.shape[1]) @ rows)[:, 0] / rows.shape[1]  # (B, C)
        hidden = F.relu(F.linear(pooled, self.fc1.weight.flatten(1), self.fc1.bias))
        return x * F.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()[:, :, None, None]


class SENetBackbone(nn.Module):
    """layer0..layer4 of timm's SENet, which is pretrainedmodels' own; strides 4, 4, 8, 16, 32."""

    def __init__(self, name):
        super().__init__()
        layers = {'layers': [1, 1, 1, 1]} if name == 'seresnext14' else {}
        network = timm.create_model(BACKBONES[name], in_chans=4, num_classes=0, **layers)
        for layer in ('layer0', 'pool0', 'layer1', 'layer2', 'layer3', 'layer4'):
            setattr(self, layer, getattr(network, layer))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # torch's own start, not timm's
            if isinstance(module, senet.SEModule):  # in each case the same parameters under the same names
                module.__class__ = SqueezeExcite
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                module.__class__ = Grouped
            elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.__class__ = Pointwise
        blind_stem(self)
        self.channels = network.num_features

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(self.pool0(self.layer0(x))))))


class TimmBackbone(nn.Module):
    """Any timm network that gives a map of features; tokens and channels-last maps are brought into (B, C, h, w)."""

    def __init__(self, name, height, width):
        super().__init__()
        self.size, self.options = (height, width), dict[str, Any](num_classes=0, global_pool='')
        try:
            try:
                self.network = timm.create_model(name, in_chans=4, img_size=self.size, **self.options)
                self.options['img_size'] = self.size
            except TypeError:  # a convolutional network, which takes any size and has no such argument
                self.network = timm.create_model(name, in_chans=4, **self.options)
            blind_stem(self)
            self.channels = self.network.num_features
            with torch.no_grad():
                found = self.eval()(torch.zeros(1, 4, height, width)).shape
            if len(found) != 4 or found[1] != self.channels:
                raise ValueError(f'its features have the shape {tuple(found)}')
        except Exception as error:  # many kinds: networks for one size only, of several maps, without a stem
            raise_if_machines(error)
            raise UserError(f'timm/{name} gives no map of features from {height}x{width} pixels ({error}): choose another '
                            'network, or another height and width') from error
        self.train()

    def forward(self, x):
        features = self.network.forward_features(x)
        if features.dim() == 3:  # (B, tokens, C)
            features = features[:, getattr(self.network, 'num_prefix_tokens', 0):]
            cut: Any = self.network.patch_embed
            size = cut.dynamic_feat_size(x.shape[-2:]) if hasattr(cut, 'dynamic_feat_size') else cut.grid_size
            return features.transpose(1, 2).unflatten(2, size)  # (B, C, h, w)
        if features.shape[1] != self.channels:  # (B, h, w, C)
            features = features.permute(0, 3, 1, 2)
        return features


def blind_stem(model):
    """The first convolution's filter of the fourth input channel, the mask, starts at zero. ValueError if it has none."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.in_channels != 4:
        raise ValueError('its first layer is no convolution of the image')
    nn.init.zeros_(stem.weight[:, 3:])


def fold_batch_norms(backbone):
    """Multiply each batch norm of a SENet into the convolution before it: the same output in eval mode, in less time."""
    for parent in backbone.modules() if isinstance(backbone, SENetBackbone) else ():
        children = list(parent.named_children())
        for (name, convolution), (other, norm) in zip(children, children[1:]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution.eval(), norm.eval()))
                setattr(parent, other, nn.Identity())


def load_imagenet(backbone, model_name, weights_dir='weights'):
    """Fill `backbone` with ImageNet weights from a file in `weights_dir`, else from the first mirror that answers.

    Raises UserError when no source has them, when a file does not hash to its name, and when a layer stays unfilled.
    """
    name = check_model_name(model_name)
    if name.startswith('timm/'):
        try:
            source = timm.create_model(name[5:], pretrained=True, **backbone.options)
        except Exception as error:  # the hub's client raises many kinds; the cause stands in the sentence
            raise UserError(f'the weights of {name} could not be fetched ({error}); '
                            'set pretrained = False to train from random weights') from error
        fill(backbone, {f'network.{key}': value for key, value in source.state_dict().items()}, name)
        require_blind(backbone, source, name)
    else:
        file = _weights_file(name, Path(weights_dir))
        try:
            state = torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise_if_machines(error)
            raise UserError(f'{file} holds no weights ({type(error).__name__}): delete it and run again') from error
        fill(backbone, state, name)


def fill(backbone, state, name):
    """Load a three-channel ImageNet state dict (its classifier is ignored) into the four-channel backbone, strictly."""
    own = backbone.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(('last_linear.', 'fc.'))}
    for key, value in state.items():
        if key in own and own[key].dim() == 4 and own[key].shape[1] == 4 and value.shape[1] == 3:
            state[key] = torch.cat([value, torch.zeros_like(value[:, :1])], 1)  # (out, 4, k, k)
    counts = {key: own[key] for key in own if key.endswith('num_batches_tracked')}  # files older than torch 0.4.1 lack them
    try:
        backbone.load_state_dict({**counts, **state})
    except RuntimeError as error:
        raise UserError(f'the weight file does not fit {name}: {" ".join(str(error).split())[:300]}') from error


@torch.no_grad()
def require_blind(backbone, source, name):
    """UserError unless a timm network gives what its three-channel `source` does: some normalise the first layer's weights."""
    image = torch.rand(1, 4, *backbone.size)
    found, expected = (net.eval().forward_features(part) for net, part in ((backbone.network, image), (source, image[:, :3])))
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item()):
        raise UserError(f"{name}'s first layer does not bear a fourth channel: choose another network, or set pretrained = False")
    backbone.train()


def _weights_file(name, weights_dir):
    if name not in WEIGHTS:
        raise UserError(f'{name} has no ImageNet weights; set pretrained = False to train it from random weights')
    folder, *files = WEIGHTS[name]
    for file in files:
        if (weights_dir / file).exists():
            _check_hash(weights_dir / file)
            return weights_dir / file
    causes = []
    sweep(weights_dir)
    for mirror in _MIRRORS:
        url = mirror.format(folder=folder, name=files[0])
        try:
            write_whole(weights_dir / files[0], lambda path: _download(url, path, _hash_of(files[0])))
            return weights_dir / files[0]
        except (OSError, ValueError, HTTPException) as error:
            causes.append(f'{url}: {error.__cause__ or error}')  # write_whole names the file, its cause the reason
    raise UserError(f'no mirror gave the ImageNet weights of {name} ({"; ".join(causes)}): download {files[0]} by hand '
                    f'into {weights_dir}/, or set pretrained = False to train from random weights')


class _OnlyHttps(HTTPHandler, FTPHandler):
    """In place of these two: mirrors send on to hosts of their own, but not from https to plain text."""

    def http_open(self, request):
        raise OSError(f'it leads to {request.full_url}, which is not https')
    ftp_open = http_open


def _download(url, path, digest):
    """OSError (or another) for what cannot be fetched, is not what the hash says, or stops for SILENCE seconds."""
    with build_opener(_OnlyHttps).open(url, timeout=SILENCE) as answer, open(path, 'wb') as file, \
            tqdm.wrapattr(answer, 'read', total=getattr(answer, 'length', None), unit='B', unit_scale=True) as body:
        shutil.copyfileobj(body, file)
    if not sha256(path).startswith(digest):
        raise OSError('its content is not what the hash in its name says')


def _hash_of(file_name):
    return Path(file_name).stem.rsplit('-', 1)[1]


def _check_hash(path):
    digest = sha256(path)
    if not digest.startswith(_hash_of(path)):
        raise UserError(f'{path} is damaged: its SHA-256 begins with {digest[:8]}, its name says {_hash_of(path)}; '
                        'delete it and run again')


def freeze_early(backbone):
    """Stop the early layers: no gradient, and batch norm statistics that stand still (see `train_mode`).

    SENets: layer0, layer1, layer2. timm networks: the first half of the groups that timm itself counts (stem, stages).
    Raises UserError for a network that has no such groups.
    """
    if isinstance(backbone, TimmBackbone):
        network = backbone.network
        if not hasattr(network, 'group_matcher'):
            raise UserError('this model_name does not say which of its layers are early ones: set freeze = False')
        groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)  # name -> group
        early = sorted(set(groups.values()))[:math.ceil(len(set(groups.values())) / 2)]
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(groups[name] not in early)
        return
    for layer in FROZEN_LAYERS:
        getattr(backbone, layer).requires_grad_(False)


def train_mode(module):
    """`module.train()`, but a layer whose parameters are all frozen stays in eval mode: its statistics stand still."""
    module.train()
    for layer in module.modules():
        parameters = list(layer.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            layer.eval()
