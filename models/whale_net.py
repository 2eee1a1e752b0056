"""WhaleNet: backbone -> global embedding and 2N sigmoid classifiers; and a local branch of strips for aligned triplets."""
import torch
import torch.nn.functional as F
from torch import nn

from models.backbone import Pointwise, build_backbone

LOCAL_CHANNELS = 512
LOGIT_SCALE = 16.0  # the embedding has length 1: without a scale its logits could not leave the sigmoid's middle
# Images enter as 0..1 RGB and are normalised here, so that every script does the same. ImageNet's statistics.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class WhaleNet(nn.Module):
    """Input (B, 4, H, W): RGB in 0..1, mask 0/1. Output: embedding (B, C), logits (B, classes), strips (B, S, 512) or None.

    The embedding (after the batch norm neck and L2, as in arXiv:1903.07071) serves classifiers, triplet loss and
    gallery alike. `classes` is 2N: the ids, then their mirror images; new_whale has no unit.
    """

    def __init__(self, model_name, classes, height=256, width=512, strips='across'):
        super().__init__()
        self.across = strips == 'across'
        self.backbone = build_backbone(model_name, height, width)
        channels = self.backbone.channels
        self.neck = nn.BatchNorm1d(channels)
        self.neck.bias.requires_grad_(False)  # the embedding stays centred, as the cosine wants it
        self.head = nn.Linear(channels, classes)
        self.local = nn.Sequential(Pointwise(channels, LOCAL_CHANNELS, 1, bias=False), nn.BatchNorm2d(LOCAL_CHANNELS))
        self.register_buffer('mean', torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        nn.init.normal_(self.head.weight, std=0.001)  # every classifier starts undecided
        nn.init.zeros_(self.head.bias)

    def forward(self, images, local=True):
        rgb = (images[:, :3] - self.mean) / self.std
        features = self.backbone(torch.cat([rgb, images[:, 3:]], 1))  # (B, C, h, w)
        with torch.autocast(images.device.type, enabled=False):  # bf16 has 8 bits: thousands of logits would tie
            embedding = F.normalize(self.neck(features.float().mean((2, 3))))  # (B, C)
            logits = LOGIT_SCALE * self.head(embedding)  # (B, 2N)
        if not local:
            return embedding, logits, None
        strips = self.local(features).mean(2 if self.across else 3).float()  # (B, 512, w or h)
        return embedding, logits, F.normalize(strips, dim=1).transpose(1, 2)


def whale_net(made, classes):
    """The network that the constants of a training describe; `made` is a dict, as a checkpoint holds them."""
    return WhaleNet(made['model_name'], classes, made['height'], made['width'], made['strips'])
