"""How often the compiled QDQ EfficientNet-Lite0 names the same class as the compiled f32 model, over 72 crops of the pictures in
scikit-image and scikit-learn: the crops that derive_models.py calibrates with. onnxruntime without graph optimisation agrees on 64.

    python3 scripts/qdq_top1.py PAVAGE MODELS        PAVAGE is the program, MODELS the folder of fetch_models.sh
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
import skimage
import sklearn
from PIL import Image

pavage, models = sys.argv[1:3]
pictures = [os.path.join(os.path.dirname(skimage.__file__), "data", n) for n in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "ihc.png", "motorcycle_left.png")]
pictures += [os.path.join(os.path.dirname(sklearn.__file__), "datasets", "images", n) for n in ("china.jpg", "flower.jpg")]
rng, crops = np.random.default_rng(0), []
for path in pictures:
    image = Image.open(path).convert("RGB")
    for _ in range(8):
        side = int(min(image.size) * rng.uniform(0.5, 1))
        x, y = rng.integers(0, image.width - side + 1), rng.integers(0, image.height - side + 1)
        crop = image.crop((x, y, x + side, y + side)).resize((224, 224), Image.BICUBIC)
        crops.append(((np.asarray(crop, np.float32) - 127) / 128).transpose(2, 0, 1))
batch = np.stack(crops)
with tempfile.TemporaryDirectory() as folder:
    np.savez(f"{folder}/in.npz", **{"in:input": batch})
    top = {}
    for name in ("efficientnet_lite0", "efficientnet_lite0_qdq"):
        subprocess.run([pavage, "run", f"{models}/{name}.onnx", "--inputs", f"{folder}/in.npz", "--save", f"{folder}/{name}.npz"], check=True, capture_output=True)
        saved = np.load(f"{folder}/{name}.npz")
        top[name] = saved[saved.files[0]].argmax(1)
same = int((top["efficientnet_lite0"] == top["efficientnet_lite0_qdq"]).sum())
print(f"{same} of {len(batch)} crops")
