import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from drafts.resume import CONFIG, WORK, ROOT, recipe
from lcm_kit.tiny import probe
d = recipe.scenes(CONFIG)
r = recipe.train_probe(CONFIG, WORK, np.load(WORK / "renders.npy", mmap_mode="r")[: CONFIG.renders], d[: CONFIG.renders])
probe.save_probe(r, WORK / "probe")
