"""Write src/aplsmear/layers.json anew: what keras.applications has. To be run when Keras changes (minutes).

Usage: python tools/keras_layers.py
"""

import inspect
import itertools
import json
import re
from typing import Any

from aplsmear.layers import TABLE

# What the pipeline sets itself, or what only concerns the top that it leaves away.
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
    """What `aplsmear.layers` says of one network: options, smallest side, layers by switches.

    Layers are those that give a map of height, width and channels. Switches are the options that are true or
    false: each way of setting them may have other layers.
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
        with StatelessScope(initialize_variables=False):  # the weights are not needed
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
    """The smallest side in px that it takes, as it says itself."""
    try:
        builder(include_top=False, weights=None, input_shape=(1, 1, 3))
    except ValueError as error:
        found = re.search(r"at least (\d+)", str(error))
        return int(found[1]) if found else 1
    return 1


if __name__ == "__main__":
    main()
