"""Reads recipes from preset names, YAML files, YAML text and modifier objects.

YAML is accepted in each layout that llm-compressor reads or writes: stages (`default_stage: {default_modifiers:
{AWQModifier: {...}}}`), a flat mapping of modifiers, or a list of such mappings, in any nesting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from awqdist.errors import RecipeError
from awqdist.recipe.build import MODIFIERS, build_recipe
from awqdist.recipe.matching import suggestion
from awqdist.recipe.modifiers import Modifier
from awqdist.recipe.recipe import Recipe

RecipeSource = str | Path | Recipe | Modifier | Sequence[Modifier] | None

_PACKAGE = Path(__file__).parents[1]
_PRESET_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # of a wheel, of a checkout
_NESTING = re.compile(r"(.*_)?(stage|modifiers)(_\d+)?")  # quant_stage, quant_modifiers, default_stage_0


def load_recipe(source: RecipeSource = None) -> Recipe:
    """Returns the recipe that `source` describes.

    Args:
        source: A preset's name, the path of a YAML file, YAML text (any string with a line break), a modifier or a list
            of modifiers, a Recipe, or None for the preset "default".

    Raises:
        RecipeError: If the recipe cannot be read, contradicts itself or asks for something that cannot be done. The
            message names the file, and line and column of errors in YAML.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, str) and "\n" in source:
        return _from_text(source, "recipe text")
    if isinstance(source, (str, Path)) or source is None:
        path = _path_of("default" if source is None else source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} cannot be read ({error}); give a readable YAML file in UTF-8") from error
        return _from_text(text, f"recipe {path}")
    modifiers: Any = source if isinstance(source, (list, tuple)) else [source]
    return build_recipe(modifiers)


def preset_names() -> list[str]:
    """Returns the names of the recipes that ship with awqdist, sorted."""
    return sorted({path.stem for folder in _PRESET_FOLDERS for path in folder.glob("*.yaml")})


def _path_of(source: str | Path) -> Path:
    presets = preset_names()
    if isinstance(source, str) and source in presets:
        return next(path for folder in _PRESET_FOLDERS if (path := folder / f"{source}.yaml").is_file())
    path = Path(source)
    if path.is_file():
        return path
    if path.exists():
        raise RecipeError(f"recipe {path} is not a file; give a YAML file or a preset ({', '.join(presets)})")
    nearest = suggestion(path.stem, presets)
    advice = f"; {nearest}" if nearest.startswith("did") else ""
    raise RecipeError(
        f"recipe {str(source)!r} is neither a file nor a preset; presets are {', '.join(presets)}{advice}"
    )


def _from_text(text: str, where: str) -> Recipe:
    try:
        return build_recipe(list(_modifiers(yaml.load(text, _RecipeLoader))))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        message = f"{where}{place}: not valid YAML: {error.problem or error.context}; correct it there"
        raise RecipeError(message) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {str(error).splitlines()[0]}; correct it") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: a stage contains itself through a YAML alias; write it out") from error


def _modifiers(tree: Any) -> Iterator[Modifier]:
    """Yields all modifiers of a YAML tree in its order. Raises RecipeError for anything else in it."""
    if isinstance(tree, list):
        for item in tree:
            yield from _modifiers(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in MODIFIERS:
                yield _modifier(key, value)
            elif isinstance(key, str) and _NESTING.fullmatch(key):
                yield from _modifiers(value)
            elif key != "args":
                raise RecipeError(f"{str(key)!r} is not a known modifier; known are {', '.join(MODIFIERS)}")
            elif value:
                raise RecipeError(f"args are not filled in, found {value!r}; write the values where they belong")
    elif isinstance(tree, str) and tree in MODIFIERS:
        yield _modifier(tree, None)
    elif tree is not None:
        raise RecipeError(f"expected modifiers ({', '.join(MODIFIERS)}), found {tree!r}")


def _modifier(name: str, fields: Any) -> Modifier:
    if not isinstance(fields, dict) and fields is not None:
        raise RecipeError(f"{name}: expected a mapping of its keys, found {fields!r}")
    for key in fields or {}:
        if not isinstance(key, str):
            raise RecipeError(f"{name} has no key {key!r}; keys are words")
    return MODIFIERS[name](**(fields or {}))


class _RecipeLoader(yaml.SafeLoader):
    """Reads YAML safely, refuses repeated keys, and accepts the Python objects that llm-compressor 0.14 writes."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                problem = f"the key {key.value!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _python_object(_: yaml.SafeLoader, kind: str, node: Any) -> None:
    """Reads a device, or llm-compressor's marker for "not given", as None. Runs nothing.

    Only `offload_device` holds such objects, and it changes nothing here.
    """
    if kind not in ("torch.device", "llmcompressor.sentinel.Sentinel"):
        problem = f"a Python object of {kind} cannot be a value of a recipe"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_RecipeLoader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:", _python_object)
