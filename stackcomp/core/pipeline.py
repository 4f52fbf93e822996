"""`Pipeline`: an immutable ordered tuple of passes that prints to Python and reads back. Pipelines nest."""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from stackcomp.core.errors import SettingError, UnknownPass
from stackcomp.core.passes import Pass
from stackcomp.core.selection import nearest


class Pipeline:
    """Passes to run in order; a pipeline inside a pipeline stands for its passes."""

    __slots__ = ("steps",)
    steps: "tuple[Pass | Pipeline, ...]"

    def __init__(self, *steps: Any) -> None:
        for step in steps:
            if not isinstance(step, Pass | Pipeline):
                raise SettingError(
                    f"a pipeline takes passes and pipelines, not {step!r}: build the pass, as in Int8Weights()"
                )
        object.__setattr__(self, "steps", tuple(steps))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a pipeline does not change ({name}): build another one")

    def flat(self) -> tuple[Pass, ...]:
        """The passes in the order they run, nested pipelines opened."""
        return tuple(step for item in self.steps for step in item.flat())

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.flat())

    def __len__(self) -> int:
        return len(self.flat())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __repr__(self) -> str:
        """Python that builds this pipeline again, one pass a line where there are several."""
        if len(self.steps) < 2:
            return f"Pipeline({', '.join(map(repr, self.steps))})"
        inner = "".join(f"    {line}\n" for step in self.steps for line in f"{step!r},".splitlines())
        return f"Pipeline(\n{inner})"

    @staticmethod
    def parse(text: str, registered: Mapping[str, type[Pass]]) -> "Pipeline":
        """Read what `repr` wrote, without running it: calls of registered passes with literal settings,
        nothing else.

        Raises UnknownPass, UnknownSetting or SettingError.
        """
        given: Any = text
        if not isinstance(given, str):
            raise SettingError(f"not a pipeline: {given!r}; give the text that repr() of one writes")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise SettingError(
                f"not a pipeline: {text!r} ({error.msg}); write Pipeline(Pass(setting=value), ...)"
            ) from error
        step = _read(tree, registered)
        return step if isinstance(step, Pipeline) else Pipeline(step)


def _read(node: ast.expr, registered: Mapping[str, type[Pass]]) -> "Pass | Pipeline":
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        raise SettingError(f"not a pass: {ast.unparse(node)}; write Pass(setting=value)")
    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
    if name == "Pipeline" and not node.keywords:
        return Pipeline(*(_read(item, registered) for item in node.args))
    if name == "Pipeline":
        raise SettingError(f"{ast.unparse(node)}: a pipeline takes its passes without names")
    if name not in registered:
        raise UnknownPass(f"no pass is named {name!r}: the nearest are {nearest(name, registered)}")
    if any(item.arg is None for item in node.keywords):
        raise SettingError(f"{ast.unparse(node)}: settings are given one by one, as name=value")
    try:
        settings = {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}
    except ValueError as error:
        raise SettingError(f"{name}: settings must be literals ({error})") from error
    return registered[name](*map(ast.unparse, node.args), **settings)
