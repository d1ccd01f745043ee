"""Registries: names to classes, with discovery of the files of a package."""

import sys

import pytest

from intarsia.config import Config
from intarsia.registry import Registry


def registry_of(kind="shape", package=None):
    shapes: Registry = Registry(kind, package)

    class ShapeConfig(Config, registry=shapes):
        """base"""

    return shapes, ShapeConfig


def add(shapes, base, name):
    class AnyConfig(base):
        size: int = 1

    @shapes.register(name, AnyConfig)
    class Any_:
        def __init__(self, config, *args, **kwargs):
            self.config, self.args, self.kwargs = config, args, kwargs

    return AnyConfig, Any_


def test_build_calls_the_registered_class_with_the_configuration():
    shapes, base = registry_of()
    config, cls = add(shapes, base, "box")
    built = shapes.build(config(size=3), 1, a=2)
    assert type(built) is cls and built.config.size == 3 and built.args == (1,) and built.kwargs == {"a": 2}
    assert shapes.names() == ["box"] and shapes.get("box") is cls and shapes.config("box") is config
    assert cls.type_name == config.type_name == "box"


def test_a_name_is_taken_once():
    shapes, base = registry_of()
    add(shapes, base, "box")

    class OtherConfig(base):
        pass

    with pytest.raises(ValueError, match="shape 'box' is registered twice"):
        shapes.register("box", OtherConfig)(type("Other", (), {}))
    assert OtherConfig.type_name is None, "a refused registration leaves no trace"


def test_a_configuration_class_belongs_to_one_name_and_one_registry():
    shapes, base = registry_of()
    config, _ = add(shapes, base, "box")
    with pytest.raises(ValueError, match="shape 'ball': AnyConfig already configures 'box'"):
        shapes.register("ball", config)(type("Ball", (), {}))
    _, foreign = registry_of("colour")
    with pytest.raises(ValueError, match="shape 'ball': ShapeConfig is no configuration of a shape"):
        shapes.register("ball", foreign)(type("Ball", (), {}))
    assert shapes.names() == ["box"]


@pytest.mark.parametrize(("name", "said"), [("bxo", "; did you mean 'box'?"), ("zzz", ";"), (None, ";"), (["box"], "")])
def test_an_unknown_name_is_answered_with_the_nearest_and_the_known(name, said):
    shapes, base = registry_of()
    add(shapes, base, "box")
    add(shapes, base, "ring")
    with pytest.raises(ValueError, match="known: box, ring") as caught:
        shapes.get(name)
    assert f"unknown shape {name!r}{said}" in str(caught.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on disk whose modules may register themselves."""
    folder = tmp_path / "found_shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text(
        "from intarsia.config import Config\nfrom intarsia.registry import Registry\n"
        "SHAPES = Registry('shape', 'found_shapes')\nclass ShapeConfig(Config, registry=SHAPES):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "found_shapes"]:
        del sys.modules[name]


MODULE = """
from found_shapes.base import SHAPES, ShapeConfig
class C(ShapeConfig):
    inner: ShapeConfig | None = None
@SHAPES.register({0!r}, C)
class Cls: pass
"""


def test_a_new_file_in_the_package_adds_a_type(package):
    (package / "box.py").write_text(MODULE.format("box"))
    (package / "ball.py").write_text(MODULE.format("ball") + "\nDEFAULT = C(inner=C())\n")  # looks itself up while it is imported
    from found_shapes.base import SHAPES, ShapeConfig  # type: ignore[import-not-found]

    assert SHAPES.names() == ["ball", "box"]
    assert ShapeConfig.from_dict({"type": "box", "inner": {"type": "ball"}}).to_dict() == {
        "type": "box",
        "inner": {"type": "ball", "inner": None},
    }


def test_half_a_registry_never_passes_for_a_whole_one(package):
    (package / "box.py").write_text(MODULE.format("box"))
    (package / "broken.py").write_text("import no_such_module_anywhere\n")
    from found_shapes.base import SHAPES

    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            SHAPES.names()
    (package / "broken.py").unlink()
    assert SHAPES.names() == ["box"]
