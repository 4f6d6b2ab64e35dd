"""The synthetic world: seeded, captioned, drawn where it says."""

import numpy as np
import pytest

from pusa_dist.world.caption import caption, parse
from pusa_dist.world.render import coverage, render
from pusa_dist.world.scene import BACKGROUNDS, COLOURS, NUM_FRAMES, SIDE, combinations, held_out, scene
from pusa_dist.world.vocabulary import words, world_tokenizer

SCENES = [scene(seed, split) for split in ("train", "held-out") for seed in range(40)]


def _attributes(one: object) -> tuple[str, ...]:
    return tuple(getattr(one, name) for name in ("shape", "colour", "size", "direction", "speed", "background"))


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
    for split in ("train", "held-out"):
        for column in zip(*combinations(split), strict=True):
            assert set(column) == {word for each in combinations("train") for word in each} & set(column)
            assert len(set(column)) > 1


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


def test_a_caption_is_read_back() -> None:
    for one in SCENES:
        assert _attributes(parse(caption(one))) == _attributes(one)
    assert parse(" A large RED circle moves quickly right on a gray background. ").shape == "circle"


@pytest.mark.parametrize("text", ["", "a red circle", "a large red circle moves quickly right on a pink background"])
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_the_tokenizer_knows_every_caption_and_takes_any_text() -> None:
    tokenizer = world_tokenizer()
    unknown = words().index("<unk>")
    for one in SCENES:
        ids = tokenizer.encode(caption(one)).ids
        assert unknown not in ids
        assert ids[-1] == words().index("</s>")
    assert tokenizer.encode("").ids == [1]
    assert unknown in tokenizer.encode("a striped zebra").ids
