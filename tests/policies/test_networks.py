"""Networks for environments."""

import copy

import torch

from heeler.policies.networks import ImageEncoder


def test_the_memory_order_of_pictures_changes_no_number():
    torch.manual_seed(0)
    encoder = ImageEncoder((4, 84, 84), features=16)
    plain = copy.deepcopy(encoder)
    images = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    features = encoder(images)
    expected = plain.linear(plain.convolutions(images.float() / 255.0))
    torch.testing.assert_close(features, expected)
    features.square().sum().backward()
    expected.square().sum().backward()
    for mine, its in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
