"""Confusion sections of reports, against matrices worked out by hand."""

import numpy as np

from latentgnn.tasks.confusion import confusion_section

COUNTS = np.array([[5, 2, 0], [0, 1, 3], [4, 0, 0]])


def test_mistakes_are_listed_by_their_number_with_their_part_of_the_row() -> None:
    section = confusion_section("", ["a", "b"], COUNTS, unit="objects", absent=("nothing there", "not found"))
    [table] = section.tables
    assert table.columns == ("truth", "taken for", "objects", "of the row")
    assert table.rows == (
        ("nothing there", "a", "4", "100.0%"),
        ("b", "not found", "3", "75.0%"),
        ("a", "b", "2", "28.6%"),
    )
    [matrix] = section.matrices
    assert matrix.rows == ("a", "b", "nothing there")
    assert matrix.columns == ("a", "b", "not found")
    assert matrix.counts == ((5, 2, 0), (0, 1, 3), (4, 0, 0))


def test_without_mistakes_there_is_no_list() -> None:
    section = confusion_section("", ["a", "b"], np.diag([3, 4]), unit="points")
    assert section.tables == ()
    assert section.matrices[0].counts == ((3, 0), (0, 4))


def test_a_large_matrix_shows_the_names_with_most_mistakes() -> None:
    counts = np.diag(np.full(31, 10))
    counts[30, 30] = 0
    # Twenty of thirty names have mistakes: the even ones below 40 (by 1 to 15), and 25 and more.
    wrong = [*range(0, 30, 2), 21, 23, 25, 27, 29]
    for number, index in enumerate(wrong, start=2):
        counts[index, 30] = number
    counts[1, 3] = 1
    names = [f"n{index}" for index in range(30)]
    section = confusion_section("", names, counts, unit="objects", absent=("nothing there", "not found"))
    [matrix] = section.matrices
    kept = sorted(wrong)
    assert matrix.rows == (*(f"n{index}" for index in kept), "10 others", "nothing there")
    assert matrix.columns == (*matrix.rows[:-1], "not found")
    shown = np.array(matrix.counts)
    assert shown.shape == (22, 22)
    assert shown.sum() == counts.sum()
    assert shown[:20, 21].tolist() == [counts[index, 30] for index in kept]
    # Ten others with ten of each, and one mistake among them.
    assert shown[20].tolist() == [0] * 20 + [101, 0]
    assert len(section.tables[0].rows) == 12
    assert section.tables[0].rows[0] == ("n29", "not found", "21", "67.7%")
