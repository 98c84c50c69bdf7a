"""Amounts as people read them."""

import pytest

from dicomscp.telemetry.units import readable_size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (99.94 * 1024, "99.9 KiB"),
        (200 << 20, "200 MiB"),
        (1 << 30, "1.0 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_a_size_is_told_in_the_units_of_settings(count, text):
    assert readable_size(count) == text
