"""Names defined in source files, read without importing them: importing torch would delay an error message too long.

A library may change its files. So the names serve only hints and early errors that the library itself would raise
later; if nothing is found, the result is empty and the later check decides.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "plain_transformers",
    "read_keys",
    "read_parameters",
    "read_source",
    "smp_decoders",
    "smp_encoders",
    "timm_models",
    "timm_optimizers",
    "timm_schedules",
]

_SMP, _TIMM = "segmentation_models_pytorch", "timm"
_ENCODERS = re.compile(r'^    "([\w-]+)": \{\s+"(?:encoder|params|pretrained_settings)"', re.MULTILINE)
_REGISTERED = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
_OPTIMIZERS = re.compile(r"""OptimInfo\(\s*(?:name=)?['"](\w+)['"]|register_alias\(['"](\w+)['"]""")
_DEPRECATED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)\}\)", re.MULTILINE | re.DOTALL)


@cache
def read_keys(path: str, table: str) -> list[str]:
    """Return the keys of a dict, or the names and texts in a list, that a module assigns to ``table``.

    Args:
        path: Path of the file from its top-level package on, such as ``"ema_seg/attention/__init__.py"``.
        table: Name of the variable.
    """
    for name, value in _assignments(ast.parse(read_source(path))):
        if name == table and isinstance(value, ast.Dict):
            return [key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        if name == table and isinstance(value, ast.List):
            return [name for element in value.elts for name in _names(element)]
    return []


@cache
def read_parameters(folder: str, class_name: str) -> list[str]:
    """Return the names of the arguments of a class's constructor.

    Args:
        folder: Folder, searched at any depth, or file; a path from its top-level package on.
        class_name: Name of the class, in any case.
    """
    for file in _files(folder):
        if not re.search(rf"^class {class_name}\b", _text(file), re.MULTILINE | re.IGNORECASE):
            continue
        for node in ast.walk(ast.parse(_text(file))):
            if isinstance(node, ast.ClassDef) and node.name.lower() == class_name.lower():
                return [name for method in node.body for name in _arguments(method)]
    return []


@cache
def smp_decoders() -> list[str]:
    """Return the names of smp's architectures, as ``build_segmenter`` takes them."""
    return [name.lower() for name in read_keys(f"{_SMP}/__init__.py", "_MODEL_ARCHITECTURES")]


@cache
def smp_encoders() -> list[str]:
    """Return the names of smp's own encoders."""
    return [name for file in _files(f"{_SMP}/encoders") for name in _ENCODERS.findall(_text(file))]


@cache
def plain_transformers() -> list[str]:
    """Return the names of timm's plain vision transformers; see ``ema_seg.models.vision_transformer``."""
    modules = read_keys("ema_seg/models/vision_transformer.py", "_MODULES")
    return [name for module in modules for name in timm_models(f"{module}.py")]


@cache
def timm_models(file: str = "") -> list[str]:
    """Return the names of timm's models, or those in one of its files; the deprecated ones last."""
    texts = [_text(path) for path in _files(f"{_TIMM}/models/{file}")]
    names = [name for text in texts for name in _REGISTERED.findall(text)]
    tables = [table for text in texts for table in _DEPRECATED.findall(text)]
    return names + [name for table in tables for name in re.findall(r"""['"]([\w.]+)['"]\s*:""", table)]


@cache
def timm_optimizers() -> list[str]:
    """Return the names of timm's optimisers."""
    return [name or alias for name, alias in _OPTIMIZERS.findall(read_source(f"{_TIMM}/optim/_optim_factory.py"))]


@cache
def timm_schedules() -> list[str]:
    """Return the names of timm's learning-rate schedules that ``build_schedule`` takes, and ``constant``."""
    names = [file.stem.removesuffix("_lr") for file in _files(f"{_TIMM}/scheduler") if file.stem.endswith("_lr")]
    return ["constant", *(name for name in names if name != "plateau")] if names else []


def read_source(path: str) -> str:
    """Return the content of a file, whose path begins with its top-level package; empty if it does not exist."""
    return "".join(map(_text, _files(path)))


def _arguments(method: ast.stmt) -> list[str]:
    if not isinstance(method, ast.FunctionDef) or method.name != "__init__":
        return []
    return [argument.arg for argument in (*method.args.args[1:], *method.args.kwonlyargs)]


def _names(element: ast.expr) -> list[str]:
    if isinstance(element, ast.Name):
        return [element.id]
    return [element.value] if isinstance(element, ast.Constant) and isinstance(element.value, str) else []


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                yield target.id, node.value


def _files(path: str) -> list[Path]:
    package, _, rest = path.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    found = Path(spec.submodule_search_locations[0]) / rest
    return [found] if found.is_file() else sorted(found.rglob("*.py"))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
