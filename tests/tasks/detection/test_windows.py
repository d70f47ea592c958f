import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgnn.tasks.detection.segmentations import decode_masks, plain_rle, segmentation_fault, to_rle
from latentgnn.tasks.detection.windows import Window, cut_mask, place_mask, united


def rle_of(mask):
    """Run lengths by hand: down the columns, zeros first."""
    flat = np.asarray(mask, np.uint8).T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.r_[0, flat, 0]))
    height, width = mask.shape
    counts = np.diff(np.r_[0, edges[edges < flat.size], flat.size]).tolist()
    return plain_rle(to_rle({"size": [height, width], "counts": counts}, height, width))


@st.composite
def masks_and_windows(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return np.array(bits, np.uint8).reshape(height, width), Window(left, top, right, bottom)


@settings(max_examples=300, deadline=None)
@given(masks_and_windows())
def test_cutting_is_slicing(case):
    mask, window = case
    part = mask[window.top : window.bottom, window.left : window.right]
    assert np.array_equal(cut_mask(rle_of(mask), window), part)


@settings(max_examples=300, deadline=None)
@given(masks_and_windows())
def test_placing_is_assigning_a_slice(case):
    mask, window = case
    height, width = mask.shape
    part = mask[window.top : window.bottom, window.left : window.right]
    expected = np.zeros_like(mask)
    expected[window.top : window.bottom, window.left : window.right] = part
    placed = place_mask(rle_of(part), window, (width, height))
    assert segmentation_fault(placed, width, height, may_be_empty=True) is None
    assert np.array_equal(decode_masks([placed], height, width)[0], expected)
    # The encoding is the only one: no run is split, and none is empty.
    assert placed == rle_of(expected)


def test_a_mask_of_a_large_image_is_cut_without_decoding_it():
    """10,000 x 10,000 pixels; a rectangle of 30 x 20 at (5000, 7000)."""
    rle = to_rle([[5000, 7000, 5030, 7000, 5030, 7020, 5000, 7020]], 10_000, 10_000)
    part = cut_mask(rle, Window(4990, 6990, 5040, 7040))
    assert part.shape == (50, 50)
    assert part[10:30, 10:40].all()
    assert part.sum() == 600
    assert place_mask(rle_of(part), Window(4990, 6990, 5040, 7040), (10_000, 10_000)) == plain_rle(rle)


def test_union_of_masks():
    a, b = np.zeros((2, 4, 6), np.uint8)
    a[1:3, :4] = 1
    b[1:3, 3:] = 1
    assert united([rle_of(a), rle_of(b)]) == rle_of(a | b)
    assert united([rle_of(a)]) == rle_of(a)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Window(80, 10, 180, 60), (80, 10, 100, 50)),
        (Window(100, 0, 200, 50), (100, 0, 100, 50)),
        (Window(10, 20, 30, 40), (10, 20, 30, 40)),
    ],
)
def test_what_two_windows_share(other, expected):
    assert (Window(0, 0, 100, 50) & other) == expected == (other & Window(0, 0, 100, 50))
