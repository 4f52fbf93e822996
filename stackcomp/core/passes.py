"""`Pass`: one compression technique as a frozen dataclass. Its fields are its settings, its text and its
identity.

A pass holds no policing code: the manager selects its weights, checks its contract before and after, times
it, measures it, saves it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from stackcomp.core.contract import Contract
from stackcomp.core.errors import SettingError, UnknownSetting
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.core.selection import Globs, nearest
from stackcomp.core.settings import plain, switch
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

Findings = Mapping[str, Any]  # what a pass found out, as JSON values, for the ledger


@dataclass(frozen=True, kw_only=True, repr=False)
class Pass(ABC):
    """Base of every pass. Every setting has a default, so that a pass can be built with none.

    only, skip: globs on layer paths relative to the base model; `*` crosses dots and a matched module
    includes its children. With no `only`, a pass works on every linear layer that is not tied to an
    embedding.
    """

    only: Globs = None
    skip: Globs = None

    paper: ClassVar[str]  # where the technique comes from
    idle: ClassVar[Mapping[str, Any] | None] = (
        None  # settings with which the pass does nothing, if it has such
    )
    undivided: ClassVar[str] = (
        ""  # why `only` and `skip` cannot be given, of a pass that chooses its weights itself
    )

    overhead: ClassVar[int] = 0  # bytes by which the file may grow beside its weights

    def __new__(cls, *args: Any, **settings: Any) -> "Pass":
        known = [field.name for field in fields(cls)]
        if args:
            raise UnknownSetting(f"{cls.__name__} takes its settings by name: {', '.join(known)}")
        for name in settings:
            if name not in known:
                raise UnknownSetting(
                    f"{cls.__name__} has no setting {name!r}: did you mean {nearest(name, known, 1)}? "
                    f"It has {', '.join(known)}"
                )
        return super().__new__(cls)

    globs: ClassVar[tuple[str, ...]] = ("only", "skip")  # the settings that are globs

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
            if isinstance(field.default, bool):
                switch(field.name, getattr(self, field.name))
        for name in self.globs:
            value: Any = getattr(self, name)
            if self.undivided and value is not None:
                raise SettingError(f"{name}={value!r}: {self.name} {self.undivided}; leave it out")
            if value is None or isinstance(value, str):
                continue
            globs = cast("list[Any]", [*value]) if isinstance(value, tuple | list) else []
            if not globs or not all(isinstance(glob, str) for glob in globs):
                raise SettingError(f"{name}={value!r} is no glob: give a string or a tuple of strings")
            object.__setattr__(self, name, tuple(globs))  # a list would make the pass unhashable

    @property
    def name(self) -> str:
        """The name of the pass as users write it."""
        return type(self).__name__

    @property
    def slug(self) -> str:
        """The name in a folder: `dense-sparse`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", self.name).lower()

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What this pass, with these settings, asks and promises."""

    def selected(self, plan: Plan) -> tuple[str, ...]:
        """Ids of the weights that this pass works on."""
        return plan.select(only=self.only, skip=self.skip)

    @property
    def parameter_globs(self) -> Mapping[str, Globs]:
        """The settings whose globs speak of modules and parameters of the model, by name, which no plan tells."""
        return {}

    def reshape(self, plan: Plan) -> Plan:
        """The plan once this pass has changed which weights there are, from names and shapes alone. Facts are
        the contract's business; a weight that goes by another name afterwards keeps its `origin`."""
        return plan

    def bound(self, findings: Findings) -> "Pass":
        """This pass with what its run has chosen, as `apply` told it, in the place of the rule by which it chose: what later passes
        speak of is then known. A pass whose plan is known beforehand is itself."""
        del findings
        return self

    def examine(self, weights: "Sequence[PlannedWeight]") -> None:
        """Refuse, from shapes alone, settings that do not fit the selected weights; called before any weight is read."""
        del weights  # most settings fit every weight

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """The ways in which a selected weight that is stored as `spec` may be stored afterwards, shapes as they are: as before."""
        return (spec,)

    def budget(self, specs: "Sequence[WeightSpec]") -> float | None:
        """The most that the selected weights, stored as `specs` until now, may take together, where a pass keeps to a budget; in the
        bytes of `counted`."""
        del specs
        return None

    def counted(self, spec: WeightSpec) -> float:
        """The bytes of a weight as the budget counts them."""
        return spec.total_bytes

    @property
    def undetermined(self) -> str:
        """Why the bytes of what this pass leaves are known only when it has run; empty where shapes and settings tell."""
        changes = self.contract.adds | self.contract.removes or self.contract.becomes
        silent = type(self).stores is Pass.stores and changes
        return "does not say how it stores a weight, which is counted as it was" if silent else ""

    @abstractmethod
    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        """Change the weights `context.targets` of `model` in place, and `context.tokenizer` with them where ids change; return what the
        ledger should keep."""

    def flat(self) -> "tuple[Pass, ...]":
        """The passes to run, in order: this one."""
        return (self,)

    def __repr__(self) -> str:
        """Python that builds this pass again; settings at their default are left out."""
        shown: list[str] = []
        for field in fields(self):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            value = getattr(self, field.name)
            if default is MISSING or value != default:
                shown.append(f"{field.name}={value!r}")
        return f"{self.name}({', '.join(shown)})"
