"""Download the data set from Kaggle, if `dataset.source` says so."""

from pathlib import Path

from aplsmear.params import read_params
from aplsmear.runs.stage import home, run
from aplsmear.sources.kaggle import borrow, obtain

ROOT = Path("kaggle")


def main() -> None:
    params = read_params(Path("params.yaml"))
    if params.dataset.source == "folder":
        ROOT.mkdir(exist_ok=True)
        print(f"dataset.source is `folder`: nothing to download, smears are read from {params.dataset.root}")
        return
    kaggle = params.dataset.kaggle
    asked = kaggle.owner, kaggle.slug, kaggle.version
    kept = home() / ROOT  # where an experiment with a folder of its own finds what was downloaded before
    obtained = (borrow(*asked, ROOT, kept) if kept != ROOT else None) or obtain(*asked, ROOT)
    print(f"{obtained.files} files, {obtained.bytes / 1e9:.2f} GB, version {obtained.version}")


if __name__ == "__main__":
    run(main)
