"""Numbers with units."""

from __future__ import annotations

from cluster.units import percent_of


def test_a_share_that_rounds_to_nothing_is_not_shown_as_nothing():
    said = [percent_of(share) for share in (0, 1e-9, 4e-6, 6e-6, 0.005, 1)]
    assert said == ["0.000%", "<0.001%", "<0.001%", "0.001%", "0.500%", "100.000%"]
