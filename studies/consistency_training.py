"""What the parts of improved consistency training are worth where the truth is known (docs/training.md).

python -m studies.consistency_training        about 4 minutes on one core
"""

from __future__ import annotations

from functools import partial

from lcm_kit.core.losses import LOSSES
from tests.test_closed_form import CHECKED, distil, errors

DISTANCES = {
    "l2": partial(LOSSES["l2"], c=0.0),
    "huber, c 0.001": partial(LOSSES["huber"], c=0.001),
    "huber_norm, c 0.00054": partial(LOSSES["huber_norm"], c=0.00054),
}
ROWS = [
    (steps, "l2", 1.0, False) for steps in (600, 2400)
] + [
    (steps, name, 0.0, weighted)
    for steps in (600, 2400)
    for name in DISTANCES
    for weighted in (False, True)
]  # fmt: skip


def main() -> None:
    """Print the RMS error of the learned consistency function at each timestep of CHECKED."""
    print("| steps | distance | teacher.weight | weighting |", *(f"t = {t} |" for t in CHECKED))
    for steps, name, teacher, weighted in ROWS:
        student = distil(
            1.0, "heun", teacher_weight=teacher, distance=DISTANCES[name], weighted=weighted, steps=steps
        )
        found = " | ".join(f"{error:.3f}" for error in errors(student, 1.0))
        print(
            f"| {steps} | {name} | {teacher:g} | {'interval' if weighted else 'none'} | {found} |", flush=True
        )


if __name__ == "__main__":
    main()
