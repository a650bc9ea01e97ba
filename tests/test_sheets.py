"""Contact sheets."""

from support import sheets

import numpy as np
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


def test_first_installed_font_is_used(monkeypatch):
    """DejaVu Serif, which matplotlib bundles, stands for a font with East Asian characters."""
    monkeypatch.setattr(sheets, "FONTS", ["no such font", "DejaVu Serif", "DejaVu Sans"])
    assert sheets.font(14).getname()[0] == "DejaVu Serif"
