"""The report of a merge: what was found in each matrix before calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_report(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the diagnostics of all matrices as matrices.csv and over_accumulation.png.

    Args:
        rows: one per matrix, of equal keys: tensor, shape, and numbers.
        folder: is made.
    """
    import pandas as pd

    from common.lab import figures

    folder.mkdir(exist_ok=True)
    data = pd.DataFrame(rows)
    data.to_csv(folder / "matrices.csv", index=False, float_format="%.6g")
    data["matrix"] = range(1, len(data) + 1)
    measures = {
        "inflation, largest σ": "largest σ / mean of the experts'",
        "s, top tenth": "s, top tenth of directions",
        "s, lower half": "s, lower half of directions",
    }
    tidy = data.melt("matrix", list(measures), "measure", "value")
    options = {"x": "matrix", "by": "measure", "level": 1.0, "names": measures}
    figure = figures.lines(tidy, **options, xlabel="matrix, in the order of matrices.csv", ylabel="merged / own")
    figures.save(figure, folder / "over_accumulation.png")
