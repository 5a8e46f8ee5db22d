"""Write src/aplsmear/layers.json: the networks of keras.applications. Run it for a new Keras (some minutes).

Usage: python tools/keras_layers.py
"""

import inspect
import itertools
import json
import re
from typing import Any

from aplsmear.layers import TABLE

# Options that the pipeline sets itself, and options of the classification head, which it does not use.
_SET = {
    "include_top",
    "weights",
    "input_tensor",
    "input_shape",
    "pooling",
    "classes",
    "classifier_activation",
}


def main() -> None:
    import keras

    names = sorted(name for name in dir(keras.applications) if name[0].isupper())
    table = {"keras": keras.__version__, "applications": {name: described(name) for name in names}}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{TABLE}: {len(names)} networks")


def described(name: str) -> dict[str, Any]:
    """The entry of one network: its options, smallest input, and layers.

    Only layers whose output has height, width and channels. Switches are options that are true or false; the
    layers may depend on them.
    """
    import keras
    from keras.src.backend.common.stateless_scope import StatelessScope

    builder = getattr(keras.applications, name)
    options = {key: each.default for key, each in inspect.signature(builder).parameters.items()}
    options = {key: default for key, default in options.items() if key not in _SET}
    switches = [key for key, default in options.items() if isinstance(default, bool)]
    layers: dict[str, list[str]] = {}
    for chosen in itertools.product((False, True), repeat=len(switches)):
        switched = dict(zip(switches, chosen, strict=True))
        keras.utils.clear_session()
        with StatelessScope(initialize_variables=False):  # no memory for weights
            network = builder(include_top=False, weights=None, input_shape=(96, 96, 3), **switched)
        maps = [each.name for each in network.layers if len(getattr(each.output, "shape", ())) == 4]
        layers[json.dumps(switched, sort_keys=True)] = maps
    union = list(dict.fromkeys(name for maps in layers.values() for name in maps))
    return {
        "options": sorted(options),
        "switches": {key: options[key] for key in switches},
        "smallest": _smallest(builder),
        "layers": " ".join(union),
        "without": {
            key: " ".join(name for name in union if name not in maps) for key, maps in layers.items()
        },
    }


def _smallest(builder: Any) -> int:
    """The smallest input in px that the network accepts, by its own error message."""
    try:
        builder(include_top=False, weights=None, input_shape=(1, 1, 3))
    except ValueError as error:
        found = re.search(r"at least (\d+)", str(error))
        return int(found[1]) if found else 1
    return 1


if __name__ == "__main__":
    main()
