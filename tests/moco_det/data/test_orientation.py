"""Pictures with an EXIF orientation: turned once by the header, in training and in prediction."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco_common.images import read_picture
from moco_det.config.defaults import default_config
from moco_det.data.dataset_mapper import CheckedMapper
from moco_det.data.datasets.image_frame import read_header
from pretrain.data.decoding import decode

PIXELS = np.zeros((40, 64, 3), np.uint8)
PIXELS[:10, :20] = 255
# How each tag says that the stored picture is to be shown: EXIF 2.3, section 4.6.4.
SHOWN = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, -1),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(PIXELS, 1),
}


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
@pytest.mark.parametrize("tag", SHOWN)
def test_a_picture_is_turned_exactly_once_everywhere(tmp_path, suffix, tag):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[274] = tag
    options = {"tiffinfo": {274: tag}} if suffix == "tif" else {"exif": exif}
    Image.fromarray(PIXELS).save(path, **options)
    shown = SHOWN[tag]
    header = read_header(path)
    assert header.stored == (64, 40)
    assert header.shown == (shown.shape[1], shown.shape[0])
    mapper = CheckedMapper(default_config(), False)
    mapper.augmentations.augs.clear()
    facts = {"width": shown.shape[1], "height": shown.shape[0], "image_id": 1}
    example = mapper({"file_name": str(path), **facts})
    assert example["file_name"] == str(path)
    trained = example["image"].permute(1, 2, 0).numpy()
    assert example["image"].dtype == torch.uint8
    for found in (trained, read_picture(path), decode(path.read_bytes())):
        assert found.shape == shown.shape
        assert np.abs(found.astype(int) - shown).mean() < 4
