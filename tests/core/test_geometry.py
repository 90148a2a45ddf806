from core.geometry import GEOMETRIES, LEGACY, MODERN


def test_conventions_by_hand() -> None:
    # a box from 0 to 31: 31 pixels wide, or 32 where the last pixel counts
    assert 31 - 0 + MODERN.plus_one == 31
    assert 31 - 0 + LEGACY.plus_one == 32
    # centre of the anchor in column 3 of P3: at the cell's corner, or in its middle
    assert (3 + MODERN.centre_offset) * 8 == 24
    assert (3 + LEGACY.centre_offset) * 8 == 28


def test_names() -> None:
    assert GEOMETRIES == {"modern": MODERN, "legacy": LEGACY}
