"""What all pictures have in common."""

import pytest

from cluster.output.pictures.picture import count_along, new_figure, png_of


@pytest.mark.parametrize(
    ("counts", "labels"),
    [((330, 600), ["400", "500", "600"]), ((31, 2258), ["100", "1 k"]), ((2_000, 5_000_000), ["10 k", "100 k", "1 M"])],
)
def test_counts_are_labelled_in_plain_numbers(counts, labels):
    figure = new_figure(3.0)
    axes = figure.subplots()
    axes.plot(counts, (0, 1))
    count_along(axes)
    png_of(figure)  # places the ticks
    low, high = axes.get_xlim()
    ticks = axes.xaxis.get_major_ticks() + axes.xaxis.get_minor_ticks()
    shown = {tick.get_loc(): tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high}
    assert [label for _, label in sorted(shown.items()) if label] == labels
