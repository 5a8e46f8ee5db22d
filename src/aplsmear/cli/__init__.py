"""The command `aplsmear`: everything that is not a stage of the pipeline, a module for each group."""

from aplsmear.cli import data_sets, ensembles, exchange, repository, weights
from aplsmear.cli.base import app

__all__ = ["app", "data_sets", "ensembles", "exchange", "repository", "weights"]
