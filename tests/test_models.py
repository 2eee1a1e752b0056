import hashlib
import re

import pytest
import timm
import torch
from timm.models import senet

from models import backbone as backbones
from models.backbone import (
    build_backbone,
    check_model_name,
    fill,
    fold_batch_norms,
    freeze_early,
    load_imagenet,
    train_mode,
)
from models.whale_net import WhaleNet
from utils.errors import UserError

SIZE = 64, 64


def scrambled(module, seed=0):
    """A state dict with every number drawn anew, batch norm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in module.state_dict().items():
        if not value.dtype.is_floating_point:
            state[key] = value
        elif key.endswith('running_var') or value.dim() == 1 and key.endswith('weight'):
            state[key] = 0.5 + torch.rand(value.shape, generator=generator)
        else:
            state[key] = torch.randn(value.shape, generator=generator) * (0.05 if value.dim() > 1 else 0.1)
    return state


@pytest.mark.parametrize('name', ['senet154', 'seresnet50', 'seresnext26'])
def test_a_senet_with_weights_of_timms_file_is_timms(name):
    theirs = timm.create_model(backbones.BACKBONES[name])
    state = scrambled(theirs)
    theirs.load_state_dict(state)
    ours = build_backbone(name, *SIZE)
    fill(ours, state, name)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        expected = theirs.eval().forward_features(images)
        found = ours.eval()(torch.cat([images, torch.rand(2, 1, *SIZE)], 1))
    assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_random_convolutions_begin_as_torch_begins_them():
    convolution = build_backbone('seresnext14', *SIZE).layer3[0].conv1  # 1x1, 512 channels
    assert convolution.weight.abs().max().item() == pytest.approx(512 ** -0.5, rel=1e-2)


@pytest.mark.parametrize('name', ['seresnext14', 'timm/resnet18', 'timm/convnext_atto', 'timm/vit_tiny_patch16_224',
                                  'timm/swin_tiny_patch4_window7_224', 'timm/tf_mobilenetv3_small_075'])
def test_a_mask_changes_nothing_at_first_and_features_are_maps(name):
    size = (112, 224) if '224' in name else (64, 128)
    model = build_backbone(name, *size).eval()
    images = torch.rand(2, 4, *size)
    without = torch.cat([images[:, :3], torch.zeros(2, 1, *size)], 1)
    with torch.no_grad():
        features = model(images)
        assert torch.equal(features, model(without))
    assert features.shape[:2] == (2, model.channels) and features.dim() == 4
    assert features.shape[2] < features.shape[3]


def test_the_stem_can_learn_from_the_mask():
    model = build_backbone('seresnext14', *SIZE)
    model(torch.rand(2, 4, *SIZE)).square().mean().backward()
    assert model.layer0.conv1.weight.grad[:, 3].abs().max() > 0


@pytest.fixture
def small_weights():
    model = build_backbone('seresnext14', *SIZE)
    state = scrambled(model)
    state['layer0.conv1.weight'] = state['layer0.conv1.weight'][:, :3]
    return model, state


def test_a_weight_load_cannot_fail_silently(small_weights):
    model, state = small_weights
    fill(model, {**state, 'last_linear.weight': torch.zeros(1000, 2048)}, 'seresnext14')  # the classifier is not ours
    filled = model.state_dict()
    filled['layer0.conv1.weight'] = filled['layer0.conv1.weight'][:, :3]
    assert all(torch.equal(filled[key], state[key]) for key in state)
    with pytest.raises(UserError, match='does not fit seresnext14: .*Missing key.*layer3.0.conv2.weight'):
        fill(model, {key: value for key, value in state.items() if key != 'layer3.0.conv2.weight'}, 'seresnext14')
    with pytest.raises(UserError, match='Unexpected key.*module.layer1'):
        fill(model, {**state, 'module.layer1.x': torch.zeros(1)}, 'seresnext14')
    with pytest.raises(UserError, match='size mismatch for layer1.0.bn1.bias'):
        fill(model, {**state, 'layer1.0.bn1.bias': torch.zeros(3)}, 'seresnext14')


def test_weight_files_are_used_when_their_hash_fits_their_name(tmp_path, small_weights, monkeypatch):
    _, state = small_weights
    torch.save(state, tmp_path / 'raw.pth')
    digest = hashlib.sha256((tmp_path / 'raw.pth').read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(backbones.WEIGHTS, 'seresnext14', ('v0', f'small-{digest}.pth', 'other-00000000.pth'))
    (tmp_path / 'raw.pth').rename(tmp_path / f'small-{digest}.pth')
    model = build_backbone('seresnext14', *SIZE)
    load_imagenet(model, 'seresnext14', tmp_path)
    assert torch.equal(model.layer4[0].conv1.weight, state['layer4.0.conv1.weight'])
    assert model.layer0.conv1.weight[:, 3].abs().max() == 0
    with open(tmp_path / f'small-{digest}.pth', 'ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match='is damaged'):
        load_imagenet(model, 'seresnext14', tmp_path)


def test_mirrors_are_tried_in_turn_and_a_wrong_file_is_not_kept(tmp_path, small_weights, monkeypatch):
    _, state = small_weights
    torch.save(state, tmp_path / 'good.pth')
    digest = hashlib.sha256((tmp_path / 'good.pth').read_bytes()).hexdigest()[:8]
    (tmp_path / 'mirror').mkdir()
    (tmp_path / 'good.pth').rename(tmp_path / 'mirror' / f'small-{digest}.pth')
    monkeypatch.setitem(backbones.WEIGHTS, 'seresnext14', ('mirror', f'small-{digest}.pth'))
    root = tmp_path.as_uri()
    monkeypatch.setattr(backbones, '_MIRRORS', [root + '/gone/{folder}/{name}'])
    model = build_backbone('seresnext14', *SIZE)
    with pytest.raises(UserError, match='no mirror gave the ImageNet weights of seresnext14'):
        load_imagenet(model, 'seresnext14', tmp_path / 'weights')
    monkeypatch.setattr(backbones, '_MIRRORS', [root + '/gone/{folder}/{name}', root + '/{folder}/{name}'])
    load_imagenet(model, 'seresnext14', tmp_path / 'weights')
    assert torch.equal(model.layer1[0].conv1.weight, state['layer1.0.conv1.weight'])
    (tmp_path / 'weights' / f'small-{digest}.pth').unlink()
    (tmp_path / 'mirror' / f'small-{digest}.pth').write_bytes(b'not the weights')
    with pytest.raises(UserError, match='no mirror'):
        load_imagenet(model, 'seresnext14', tmp_path / 'weights')
    assert not list((tmp_path / 'weights').iterdir())


def test_every_mirror_is_https_and_every_file_names_its_hash():
    assert all(mirror.startswith('https://') for mirror in backbones._MIRRORS)
    for _, *files in backbones.WEIGHTS.values():
        assert all(re.fullmatch('[0-9a-f]{8}', backbones._hash_of(file)) for file in files)


@pytest.mark.parametrize('name', ['seresnext14', 'seresnext26'])
def test_the_small_ones_have_no_weights(name):
    with pytest.raises(UserError, match='pretrained = False'):
        load_imagenet(build_backbone(name, *SIZE), name)


@pytest.mark.parametrize('typo, near', [
    ('senet145', 'senet154'), ('seresnext5', 'seresnext50'), ('timm/resnet19', 'timm/resnet18'),
    ('se_resnext101_32x4d', 'seresnext101')])
def test_a_typo_gets_the_nearest_names(typo, near):
    with pytest.raises(UserError, match=near):
        check_model_name(typo)


def test_timms_names_may_say_which_weights():
    assert check_model_name('timm/convnext_tiny.fb_in22k') == 'timm/convnext_tiny.fb_in22k'


@pytest.mark.parametrize('name', ['seresnext14', 'timm/resnet18'])
def test_frozen_layers_stand_still(name):
    net = WhaleNet(name, 10, *SIZE)
    freeze_early(net.backbone)
    train_mode(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.1)
    embedding, logits, strips = net(torch.rand(4, 4, *SIZE))
    (embedding.sum() + logits.square().sum() + strips.sum()).backward()
    optimizer.step()
    early = ('layer0.', 'layer1.', 'layer2.') if name == 'seresnext14' else \
        ('network.conv1', 'network.bn1', 'network.layer1', 'network.layer2')
    for key, value in net.state_dict().items():
        if key.removeprefix('backbone.').startswith(early):
            assert torch.equal(value, before[key]), key
        elif key.endswith('running_mean'):
            assert not torch.equal(value, before[key]), key


def test_a_network_that_does_not_say_which_layers_are_early_cannot_be_frozen():
    with pytest.raises(UserError, match='set freeze = False'):
        model = build_backbone('timm/resnet18', 64, 64)
        model.network = torch.nn.Conv2d(4, 8, 1)
        freeze_early(model)


@pytest.mark.parametrize('name, why', [('tresnet_m', 'its first layer is no convolution of the image'),
                                       ('mixer_s32_224', 'no attribute .patch_embed'),
                                       ('coat_tiny', 'Only token or avg pooling')])
def test_a_timm_network_without_a_map_of_features_is_refused(name, why):
    with pytest.raises(UserError, match=f'(?i)timm/{name} gives no map of features from 64x128 pixels .*{why}'):
        build_backbone(f'timm/{name}', 64, 128)


@pytest.fixture
def no_download(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **options: real(name, **options))


@pytest.mark.parametrize('name', ['resnet18', 'tf_mobilenetv3_small_075', 'convnext_atto'])
def test_loaded_timm_networks_give_what_timm_gives(name, no_download):
    """Their padding, too: `tf_` networks pad on one side only."""
    model = build_backbone(f'timm/{name}', 64, 128)
    load_imagenet(model, f'timm/{name}')
    theirs = timm.create_model(name, num_classes=0, global_pool='')
    sizes = theirs.state_dict()
    theirs.load_state_dict({key: value[:, :sizes[key].shape[1]] if value.dim() == 4 else value
                            for key, value in model.network.state_dict().items()})
    images = torch.rand(2, 4, 64, 128)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), theirs.eval().forward_features(images[:, :3]), rtol=1e-4, atol=1e-5)


def test_a_first_layer_that_a_fourth_channel_changes_is_refused(no_download):
    """It standardises its weights, the fourth channel's zeros among them."""
    model = build_backbone('timm/resnetv2_50x1_bit', 64, 64)
    with pytest.raises(UserError, match='first layer does not bear a fourth channel'):
        load_imagenet(model, 'timm/resnetv2_50x1_bit')


def test_outputs():
    net = WhaleNet('seresnext14', 12, 64, 128).eval()
    with torch.no_grad():
        embedding, logits, strips = net(torch.rand(3, 4, 64, 128))
    assert embedding.shape == (3, 2048) and logits.shape == (3, 12) and strips.shape == (3, 4, 512)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(strips.norm(dim=2), torch.ones(3, 4), atol=1e-4)
    assert torch.allclose(logits, 16 * net.head(embedding))


def test_images_are_normalised_by_the_statistics_of_imagenet_and_masks_are_not():
    net = WhaleNet('seresnext14', 12, *SIZE)
    seen = []
    net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.full((2, 4, *SIZE), 0.5))
    expected = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225, 0.5]
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-4)


def test_weights_of_a_timm_transformer_fit_another_input_size(no_download):
    """timm resamples the position embedding, if it is told the size."""
    load_imagenet(build_backbone('timm/vit_tiny_patch16_224', 64, 128), 'timm/vit_tiny_patch16_224')


REWRITTEN = [(lambda stride: backbones.Pointwise(64, 96, 1, stride), torch.nn.Conv2d),
             (lambda stride: backbones.Grouped(64, 128, 3, stride, 1, groups=16, bias=False), torch.nn.Conv2d),
             (lambda stride: backbones.SqueezeExcite(64, 4), senet.SEModule)]


@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('make, plain', REWRITTEN)
def test_a_rewritten_layer_is_the_plain_one(make, plain, stride, dtype, close):
    layer = make(stride)
    x = torch.randn(2, 64, 7, 9).contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = results(layer, x.to(dtype))
    layer.__class__ = plain
    for one, other in zip(found, results(layer, x)):
        size = torch.Tensor.norm if dtype == torch.bfloat16 else lambda values: values.abs().max()  # in bf16 a ReLU may go over
        assert size(one - other) <= close * size(other)
    assert found[1].is_contiguous(memory_format=torch.channels_last)  # or later additions are slow


def results(layer, x):
    """Output, and gradients of input and weights, of a sum with fixed weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.float(), x.grad.float(), *(parameter.grad for parameter in layer.parameters())]


def test_folded_batch_norms_change_no_output():
    net = build_backbone('seresnext14', *SIZE)
    net.load_state_dict(scrambled(net))
    images = torch.randn(2, 4, *SIZE)
    with torch.no_grad():
        before = net.eval()(images)
        fold_batch_norms(net)
        after = net(images)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * before.abs().max().item())


def test_logits_are_not_rounded_to_bf16():
    """Thousands of classifiers in eight bits would tie."""
    net = WhaleNet('seresnext14', 20, *SIZE).eval()
    torch.nn.init.normal_(net.head.weight)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        embedding, logits, *_ = net(torch.rand(2, 4, *SIZE))
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    with torch.no_grad():
        assert torch.allclose(logits, 16 * net.head(embedding), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('strips, count', [('down', 2), ('across', 4)])
def test_strips_lie_down_or_across_the_image(strips, count):
    net = WhaleNet('seresnext14', 6, 64, 128, strips=strips).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 4, 64, 128))[2].shape == (2, count, 512)
