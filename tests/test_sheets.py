"""Contact sheets."""

from support import sheets

import numpy as np
import pytest
from PIL import Image

COLUMNS = ("gray", "colorized", "original")


def test_contact_sheet_shows_names_of_any_length_and_script():
    images = [Image.new("RGB", size) for size in ((320, 200), (180, 240), (320, 240))]
    names = ("", "a", "é/猫.ж", "long " * 100)
    drawn = [np.asarray(sheets.contact_sheet([(name, images)], COLUMNS)) for name in names]
    shape = (sheets.HEAD + 240 + sheets.FOOT, 3 * (320 + sheets.MARGIN) + sheets.MARGIN, 3)
    assert {sheet.shape for sheet in drawn} == {shape}
    written = [(sheet[sheets.HEAD + 240 :] < 200).sum() for sheet in drawn]
    assert 0 == written[0] < written[1] < written[2] < written[3]
    margins = drawn[3][sheets.HEAD + 240 :, [*range(sheets.MARGIN - 2), *range(2 - sheets.MARGIN, 0)]]
    assert (margins == 255).all()
    for size in ((8, 8), (3000, 20)):  # small ones are enlarged
        thumbnail = sheets.fit(Image.new("RGB", size))
        assert thumbnail.height == 240 or thumbnail.width == 320


@pytest.mark.parametrize(("installed", "used"), [("DejaVu Serif", "DejaVu Serif"), ("no such font", "DejaVu Sans")])
def test_east_asian_names_use_an_installed_font(monkeypatch, installed, used):
    """DejaVu Serif, which matplotlib bundles, stands for a font with East Asian characters."""
    monkeypatch.setattr(sheets, "EAST_ASIAN", (installed,))
    families = [sheets.font(14, text).getname()[0] for text in ("旅行/a", "커피", "é/ж")]
    assert families == [used, used, "DejaVu Sans"]


def test_tiles_of_one_or_three_images_are_filled_up():
    square = np.zeros((32, 96, 3), np.uint8)
    assert sheets.tile([square]).shape == (34, 98, 3)
    three = sheets.tile([square] * 3)
    assert three.shape == (68, 196, 3) and (three[34:, 98:] == 255).all()
