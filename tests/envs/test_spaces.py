"""Observations and actions of every supported space, as the policy sees them."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from heeler.envs.spaces import ObservationReader, action_spec, to_environment
from heeler.types import HeelerError


def batch(space, observations):
    return concatenate(space, observations, create_empty_array(space, len(observations)))


def test_a_vector_is_read_as_float32():
    space = spaces.Box(-1, 1, (2, 3), np.float64)
    reader = ObservationReader(space, "here")
    assert reader.spec.vector == 6 and not reader.spec.images
    observations = [space.sample() for _ in range(4)]
    read = reader.read(batch(space, observations))
    assert read.dtype == np.float32 and read.shape == (4, 6)
    np.testing.assert_allclose(read, np.stack(observations).reshape(4, 6), rtol=1e-6)


@pytest.mark.parametrize(
    "space, shown",
    [
        (spaces.Discrete(3, start=5), 4),
        (spaces.Discrete(3, start=5), 8),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 3])),
        (spaces.MultiDiscrete([2, 3]), np.array([-1, 0])),
    ],
)
def test_what_lies_outside_its_space_is_refused(space, shown):
    reader = ObservationReader(spaces.Dict({"place": space}), "here")
    fine = {"place": space.sample()}
    with pytest.raises(HeelerError, match=r"here at place showed something outside its space .* in environment 1"):
        reader.read(batch(spaces.Dict({"place": space}), [fine, {"place": shown}]))


def test_a_picture_may_be_called_vector():
    picture = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    space = spaces.Dict({"vector": picture, "numbers": spaces.Box(-1, 1, (2,), np.float32)})
    reader = ObservationReader(space, "here")
    assert reader.spec.images == (("vector_image", (3, 40, 40)),) and reader.spec.vector == 2
    read = reader.read(batch(space, [space.sample()]))
    assert read["vector"].shape == (1, 2) and read["vector_image"].shape == (1, 3, 40, 40)


def test_discrete_parts_become_one_hot_and_join_in_order():
    space = spaces.Dict({
        "a": spaces.Discrete(3, start=5), "b": spaces.MultiDiscrete([2, 3]), "c": spaces.MultiBinary(2),
        "d": spaces.Tuple([spaces.Box(0, 9, (2,), np.float32)]),
    })  # fmt: skip
    reader = ObservationReader(space, "here")
    observation = {
        "a": 6, "b": np.array([1, 2]), "c": np.array([1, 0], np.int8), "d": (np.array([7.0, 8.0], np.float32),),
    }  # fmt: skip
    read = reader.read(batch(space, [observation, observation]))
    expected = [0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 7, 8]
    np.testing.assert_array_equal(read, [expected, expected])
    assert reader.spec.vector == len(expected)


@pytest.mark.parametrize(
    "shape, chw", [((40, 50, 3), (3, 40, 50)), ((4, 84, 84), (4, 84, 84)), ((64, 64), (1, 64, 64))]
)
def test_images_come_channels_first(shape, chw):
    space = spaces.Box(0, 255, shape, np.uint8)
    reader = ObservationReader(space, "here")
    assert reader.spec.images == (("image", chw),)
    image = space.sample()
    read = reader.read(batch(space, [image]))
    assert read.shape == (1, *chw) and read.dtype == np.uint8
    back = read[0].transpose(1, 2, 0) if shape[-1] == 3 else read[0].reshape(shape)
    np.testing.assert_array_equal(back, image)


def test_an_image_beside_a_vector_is_a_dict_and_the_mask_is_taken_out():
    space = spaces.Dict({
        "camera": spaces.Box(0, 255, (40, 40, 1), np.uint8), "speed": spaces.Box(0, 1, (2,), np.float32),
        "action_mask": spaces.MultiBinary(3),
    })  # fmt: skip
    reader = ObservationReader(space, "here")
    assert reader.spec.mixed and reader.spec.vector == 2
    observation = space.sample()
    observation["action_mask"] = np.array([1, 0, 1], np.int8)
    observations = batch(space, [observation])
    read = reader.read(observations)
    assert set(read) == {"vector", "camera"} and read["camera"].shape == (1, 1, 40, 40)
    np.testing.assert_array_equal(reader.masks(observations), [[True, False, True]])


def test_small_byte_arrays_are_numbers_not_pictures():
    assert ObservationReader(spaces.Box(0, 255, (7, 7, 3), np.uint8), "MiniGrid").spec.vector == 147


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=-1), spaces.MultiDiscrete([2, 5], start=[3, 0]), spaces.MultiBinary([2, 2]),
        spaces.Box(-1, 2, (2, 2), np.float32), spaces.Box(-1, 2, (3,), np.float64),
    ],
)  # fmt: skip
def test_stored_actions_reach_the_environment_inside_its_space(space):
    spec = action_spec(space, "here")
    if spec.kind == "box":
        stored = np.random.default_rng(0).normal(0, 5, (6, len(spec.sizes))).astype(np.float32)
    elif spec.kind == "discrete":
        stored = np.arange(6) % spec.sizes[0]
    else:
        sizes = [2] * len(spec.sizes) if spec.kind == "multi_binary" else spec.sizes
        stored = np.stack([np.arange(6) % size for size in sizes], axis=1)
    sent = to_environment(spec, stored)
    assert batch_space(space, 6).contains(sent)
    for action in sent:
        assert space.contains(action)


def test_unbounded_boxes_are_not_clipped():
    spec = action_spec(spaces.Box(-np.inf, np.inf, (1,), np.float32), "here")
    assert to_environment(spec, np.array([[123.0]], np.float32))[0, 0] == 123.0


@pytest.mark.parametrize("space", [spaces.Box(0, 5, (2,), np.int64), spaces.Dict({"a": spaces.Discrete(2)})])
def test_actions_that_cannot_be_chosen_are_named(space):
    with pytest.raises(HeelerError, match="here has the action space"):
        action_spec(space, "here")


def test_observations_that_no_network_reads_are_named():
    with pytest.raises(HeelerError, match=r"here has the observation space .* at words"):
        ObservationReader(spaces.Dict({"words": spaces.Text(4)}), "here")
