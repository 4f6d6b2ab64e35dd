"""The synthetic world: seeded, captioned, drawn where it says."""

from dataclasses import replace

import numpy as np
import pytest

from pusa_dist.world.caption import caption
from pusa_dist.world.render import coverage, render
from pusa_dist.world.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIDE,
    SIZES,
    SPEEDS,
    combinations,
    held_out,
    scene,
)
from pusa_dist.world.vocabulary import words, world_tokenizer

SCENES = [scene(seed, split) for split in ("train", "held-out") for seed in range(40)]
ATTRIBUTES = ("shape", "colour", "size", "direction", "speed", "background")


def _attributes(one: object) -> tuple[str, ...]:
    return tuple(getattr(one, name) for name in ATTRIBUTES)


def test_the_splits_share_no_combination_and_a_tenth_is_held_out() -> None:
    training, kept = combinations("train"), combinations("held-out")
    assert not set(training) & set(kept)
    assert 0.08 < len(kept) / (len(training) + len(kept)) < 0.13


def test_a_scene_is_of_its_split_and_depends_on_its_seed() -> None:
    for seed in range(50):
        assert held_out(_attributes(scene(seed, "held-out")))
        assert not held_out(_attributes(scene(seed)))
        assert scene(seed) == scene(seed)
    assert scene(0) != scene(1)


def test_every_word_of_the_vocabularies_occurs_in_both_splits() -> None:
    vocabularies = [set(each) for each in (SHAPES, COLOURS, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS)]
    for split in ("train", "held-out"):
        assert [set(column) for column in zip(*combinations(split), strict=True)] == vocabularies


def test_objects_stay_inside_and_their_centre_and_area_are_the_scenes() -> None:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for one in SCENES:
        for frame, share in enumerate(coverage(one)):
            assert max(share[0].max(), share[-1].max(), share[:, 0].max(), share[:, -1].max()) == 0
            centre = (np.sum(columns * share), np.sum(rows * share)) / share.sum()
            assert np.abs(centre - one.centre(frame)).max() < 0.1
            assert share.sum() == pytest.approx(np.pi * one.radius**2, rel=0.02)


def test_pixels_are_the_named_colours() -> None:
    for one in SCENES[:10]:
        frames = render(one)
        assert frames.shape == (NUM_FRAMES, SIDE, SIDE, 3)
        x, y = (round(value) for value in one.centre(3))
        assert tuple(frames[3, y, x]) == COLOURS[one.colour]
        assert tuple(frames[3, 0, 0]) == BACKGROUNDS[one.background]


def test_a_caption_says_every_attribute_so_no_two_combinations_share_one() -> None:
    every = [*combinations("train"), *combinations("held-out")]
    scenes = [replace(SCENES[0], **dict(zip(ATTRIBUTES, each, strict=True))) for each in every]
    assert len({caption(one) for one in scenes}) == len(every)
    assert all(set(_attributes(one)) <= set(caption(one).split()) for one in scenes)


def test_the_tokenizer_knows_every_caption_and_takes_any_text() -> None:
    tokenizer = world_tokenizer()
    unknown = words().index("<unk>")
    for one in SCENES:
        ids = tokenizer.encode(caption(one)).ids
        assert unknown not in ids
        assert ids[-1] == words().index("</s>")
    assert tokenizer.encode("").ids == [1]
    assert unknown in tokenizer.encode("a striped zebra").ids
