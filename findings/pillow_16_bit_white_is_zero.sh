#!/usr/bin/env bash
# Pillow inverts 8-bit grey TIFF files in which white is zero (PhotometricInterpretation 0), so that black is 0 in
# what it returns. 16-bit files of the same kind, as scanners and microscopes write them, come as they are stored:
# black is 65535. A network that was trained on the one kind sees negatives of the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0 tifffile==2025.5.10 numpy==2.2.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import PIL
import tifffile
from PIL import Image

print("pillow", PIL.__version__)
seen = {}
for dtype in (np.uint8, np.uint16):
    path = f"{sys.argv[1]}/{np.dtype(dtype).name}.tiff"
    # As it is stored: the darkest pixel has the greatest number.
    tifffile.imwrite(path, np.array([[np.iinfo(dtype).max, 0]], dtype), photometric="miniswhite")
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0, "PhotometricInterpretation is WhiteIsZero"
        seen[np.dtype(dtype).name] = np.asarray(image)[0].tolist()
print("expected: the darkest pixel is 0 in both: {'uint8': [0, 255], 'uint16': [0, 65535]}")
print("seen:    ", seen)
sys.exit(seen != {"uint8": [0, 255], "uint16": [65535, 0]})
PYTHON
