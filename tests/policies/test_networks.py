"""Networks for environments."""

import copy

import torch

from heeler.policies.networks import Body, ImageEncoder


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


def test_pictures_in_bf16_are_those_of_fp32_but_for_its_rounding():
    torch.manual_seed(0)
    body = Body(ImageEncoder((4, 84, 84), features=64), memory=0)
    rounded = copy.deepcopy(body)
    rounded.precision = "bf16"
    images = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)
    exact, near = body(images), rounded(images)
    assert near.dtype == torch.float32 and not torch.equal(exact, near)
    scale = exact.abs().max().item()
    assert (exact - near).abs().max() < 0.02 * scale  # a few roundings of 2^-9
    (exact * exact.detach()).sum().backward()
    (near * exact.detach()).sum().backward()
    for (name, mine), its in zip(rounded.named_parameters(), body.parameters(), strict=True):
        assert mine.dtype == mine.grad.dtype == torch.float32, name
        assert (mine.grad - its.grad).norm() < 0.02 * its.grad.norm(), name
