"""``python -m aplsmear.cli``."""

from aplsmear.cli import app

app()
