"""Download the data set from Kaggle, if `dataset.source` says so."""

from pathlib import Path

from aplsmear.kaggle import obtain
from aplsmear.params import read_params
from aplsmear.stage import run

ROOT = Path("kaggle")


def main() -> None:
    params = read_params(Path("params.yaml"))
    if params.dataset.source == "folder":
        ROOT.mkdir(exist_ok=True)
        print(f"dataset.source is `folder`: nothing to download, smears are read from {params.dataset.root}")
        return
    kaggle = params.dataset.kaggle
    obtained = obtain(kaggle.owner, kaggle.slug, kaggle.version, ROOT)
    print(f"{obtained.files} files, {obtained.bytes / 1e9:.2f} GB, version {obtained.version}")


if __name__ == "__main__":
    run(main)
