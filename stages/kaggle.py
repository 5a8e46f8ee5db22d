"""Download the data set from Kaggle, if `dataset.source` in params.yaml is `kaggle`."""

from pathlib import Path

from aplsmear.params import read_params
from aplsmear.runs.stage import home, run
from aplsmear.sources.kaggle import borrow, obtain

ROOT = Path("kaggle")


def main() -> None:
    params = read_params(Path("params.yaml"))
    if params.dataset.source == "folder":
        ROOT.mkdir(exist_ok=True)
        print(f"dataset.source is `folder`: no download. The smears are read from {params.dataset.root}.")
        return
    wanted = params.dataset.kaggle
    earlier = home() / ROOT  # an experiment in a folder of its own takes the download of the main folder
    obtained = borrow(wanted, ROOT, earlier) if earlier != ROOT else None
    obtained = obtained or obtain(wanted, ROOT)
    print(f"{obtained.files} files, {obtained.bytes / 1e9:.2f} GB, version {obtained.version}")


if __name__ == "__main__":
    run(main)
