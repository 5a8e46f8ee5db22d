"""The page that `dvc plots show` fills in: it carries the code that draws, so it needs no network.

DVC takes the page from the setting ``plots.html_template``. Its own page loads Vega from the internet.
"""

from __future__ import annotations

from importlib import resources

_CODE = "{code}"


def plots_page() -> str:
    """The page, with Vega, Vega-Lite and Vega-Embed of the package vl-convert in it.

    `{plot_divs}` in it is for DVC.
    """
    import vl_convert

    page = resources.files("aplsmear.workspace").joinpath("plots.html").read_text(encoding="utf-8")
    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", r"<\/script")
    return page.replace(_CODE, code)
