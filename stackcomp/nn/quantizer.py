"""How `transformers` saves and loads compressed models: a quantization method named `stackcomp`.

config.json carries, under `quantization_config`, the spec of every compressed weight. On save the specs are
read off the model; on load the compressed layers are put in place on the meta device before any tensor is
read, and the files are checked against them: a tensor that is missing, unexpected or of another shape is
refused, as `transformers` would fill it with random numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from stackcomp.core import coding, manifest
from stackcomp.core.errors import CheckpointError, UnsupportedModel
from stackcomp.core.families import Part, Stack, attention_of, between, feed_forward_of, head_features
from stackcomp.core.headers import read_headers
from stackcomp.core.matrices import Coding, MatrixSpec
from stackcomp.core.settings import whole
from stackcomp.core.spec import FORMS, WeightSpec
from stackcomp.nn import names
from stackcomp.nn.layers import CompressedLayer
from stackcomp.nn.matrix import CODINGS
from stackcomp.nn.tree import align, built, install, relative, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "stackcomp"
FORMAT = 1
_DTYPE_NAMES = {  # as safetensors write them, of the tensors that may be coded
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class StackcompConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    weights: the specs by id, as JSON; dtype: the model's own, which a load in another dtype replaces; shared:
    names of tensors that are other names of another tensor, and which (layers shared by name, plain weights
    that several layers use; paths relative to the base model); coded: whether tensors are written entropy coded; heads, neurons: how
    many attention heads (groups of them, where they share keys and values) and neurons each layer has, where the model's own config does
    not say so.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, Any],
        dtype: str,
        shared: Mapping[str, str] | None = None,
        coded: bool = False,
        heads: Iterable[int] | None = None,
        neurons: Iterable[int] | None = None,
        format: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        if format != FORMAT:
            raise CheckpointError(
                f"config.json: stackcomp format {format!r}, this version reads {FORMAT}: install a newer stackcomp, or save it again"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format = format
        self.dtype = dtype
        self.weights = {id_: dict(spec) for id_, spec in weights.items()}
        self.shared = dict(shared or {})
        self.coded = coded
        self.heads, self.neurons = (None if several is None else [*several] for several in (heads, neurons))
        for name, several in (("heads", self.heads), ("neurons", self.neurons)):
            for width in several or ():
                whole(name, width, 1)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` gave; raises CheckpointError for a newer format or a damaged one."""
        if "format" in config_dict and config_dict["format"] != FORMAT:
            return cls(weights={}, dtype="", format=config_dict["format"])
        try:
            config = cls(**config_dict)
            config.specs()
        except (TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"config.json: its quantization_config is damaged ({error}); copy or save the checkpoint again"
            ) from error
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "StackcompConfig":
        """The config of the model as it is now."""
        specs = compressed(model)
        stored = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
        known: Any = getattr(model.config, "quantization_config", None)
        ours = isinstance(known, StackcompConfig)
        plain = built(model)
        return cls(
            weights={spec.id: spec.to_json() for spec in specs},
            dtype=CODINGS[stored[0]],
            shared={
                relative(model, name): relative(model, first) for name, first in names.shared(model).items()
            },
            coded=ours and known.coded,
            heads=_widths(model, plain, attention_of, head_features(model.config.to_dict())),
            neurons=_widths(model, plain, feed_forward_of, 1),
        )

    def specs(self) -> list[WeightSpec]:
        """The specs of the compressed weights. Raises CheckpointError for one that describes no weight."""
        specs = [WeightSpec.from_json(id_, data) for id_, data in self.weights.items()]
        for spec in specs:
            if not _makes_sense(spec):
                raise CheckpointError(
                    f"{spec.id}: its matrices in config.json do not make {spec.rows} x {spec.cols}; save it again"
                )
        return specs


class StackcompQuantizer(HfQuantizer):
    """Puts the compressed layers in place when a model is loaded, and lists them when it is saved."""

    requires_calibration = True  # transformers' word for: only already compressed checkpoints
    quantization_config: StackcompConfig
    _omission: RemovableHandle
    _expanded: "finalize[..., Any] | None" = None  # removes the plain file read in the place of a coded one

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before any file is looked for: forget the weights file that a load without us asks for in vain (`checkpoint`)."""
        vars(config).pop("transformers_weights", None)
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", *, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        files = [Path(file) for file in checkpoint_files or ()]
        for file in files:
            manifest.check_file(file)
        _narrow(model, heads=config.heads, neurons=config.neurons)
        install(model, [_cast(spec, config.dtype, CODINGS[model.dtype]) for spec in config.specs()])
        self._omission = model.register_state_dict_post_hook(
            names.Omit(frozenset(names.pairs(model, config.shared)))
        )
        if files:
            names.check(model, files)
        if config.coded and checkpoint_files:
            folder = Path(mkdtemp())
            self._expanded = finalize(self, rmtree, folder, ignore_errors=True)  # also where the load fails
            checkpoint_files[:] = _expanded(files, folder)  # what is read from here on

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        self._omission.remove()
        if self._expanded is not None:
            self._expanded()
            self._expanded = None
        names.share(model, self.quantization_config.shared)
        align(model)
        _keep_names(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """What is renamed on load. Our files hold tensors as the model computes with them, so that nothing is merged or split."""
        return names.conversions()

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: each tensor once. Brings the config up to date with the model first."""
        self.quantization_config = model.config.quantization_config = StackcompConfig.of(model)
        twice = names.shared(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in twice}
        return _coded(state, model.all_tied_weights_keys) if self.quantization_config.coded else state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this of models without adapters."""
        return True


def register() -> None:
    """Make `transformers` know the method; doing it again changes nothing."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(StackcompConfig)
    register_quantizer(METHOD)(StackcompQuantizer)


def attach(model: "PreTrainedModel") -> None:
    """Let `model.save_pretrained` know that the model is compressed. Raises UnsupportedModel when another
    library quantized it.
    """
    known = getattr(model.config, "quantization_config", None)
    if isinstance(known, StackcompConfig):
        return
    if known is not None:
        raise UnsupportedModel(
            f"the model is quantized by {getattr(known, 'quant_method', type(known).__name__)}: give it in floating point"
        )
    config = StackcompConfig.of(model)
    model.config.quantization_config = config
    attributes: dict[str, Any] = {
        "hf_quantizer": StackcompQuantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": METHOD,
    }
    for name, value in attributes.items():  # as `HfQuantizer` does on load
        setattr(model, name, value)
    _keep_names(model)


def detach(model: "PreTrainedModel") -> None:
    """Let `model.save_pretrained` write a plain checkpoint again, where its config says all that there is to say."""
    plain: Any = model
    known = getattr(plain.config, "quantization_config", None)
    if not isinstance(known, StackcompConfig):
        return
    said = StackcompConfig.of(model)
    if said.weights or said.shared or said.heads or said.neurons:
        return
    del plain.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        if name in vars(plain):
            delattr(plain, name)
    plain.is_quantized = False


def code(model: "PreTrainedModel") -> None:
    """Let `model.save_pretrained` write tensors entropy coded from now on, also once the model has been loaded again."""
    attach(model)
    model.config.quantization_config.coded = True  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def compressed(model: "PreTrainedModel") -> list[WeightSpec]:
    """The specs of the compressed weights of a model."""
    return [
        handle.spec for handle in weights(model).values() if isinstance(handle.modules[0], CompressedLayer)
    ]


def _keep_names(model: "PreTrainedModel") -> None:
    """Let `model.save_pretrained` write tensors under the names and in the form that the model computes with: what `transformers` merges
    on load (experts, queries with keys and values) it could not take apart again once it is coded, or stored in unlike ways."""
    saved: Any = model
    saved._weight_conversions = []


def _coded(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors to write, coded where that pays, and a list of these. A tied one is written once: of two that are coded `transformers`
    would not see that they are one."""
    written: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for name, tensor in state.items():
        if tied.get(name) in state:
            continue
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        plain = tensor.detach().cpu().contiguous()
        found = (
            coding.encode(plain.view(-1).view(torch.uint8).numpy().tobytes(), tensor.element_size())
            if dtype
            else None
        )
        written[name] = tensor if found is None else _bytes(found[1])
        if found is not None:
            said[name] = {"dtype": dtype, "shape": [*tensor.shape], "bytes": plain.nbytes, "planes": found[0]}
    return written | ({coding.LISTING: _bytes(coding.listing(said))} if said else {})


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _expanded(files: list[Path], folder: Path) -> list[str]:
    """The plain files that coded ones stand for, in `folder`."""
    for file, (entries, start) in read_headers(files).items():
        coding.expand(file, entries, start, folder / file.name)
    return [str(folder / file.name) for file in files]


def _makes_sense(spec: WeightSpec) -> bool:
    """Whether the matrices of a spec make its weight."""
    if set(spec.matrices) not in FORMS:
        return False
    if spec.branched and (
        len(spec.matrices) < 3 or spec.transposed or spec.matrices["basis"].rows % len(spec.paths)
    ):
        return False
    whole = spec.matrices.get("weight")
    if whole is not None and (whole.rows, whole.cols) != (spec.rows, spec.cols):
        return False
    if not spec.factored:
        return spec.tile is None
    basis, coefficients = spec.matrices["basis"], spec.matrices["coefficients"]
    if spec.tile is not None:
        c, d = spec.tile
        cut = min(c, d) > 0 and spec.rows % c == 0 and spec.cols % d == 0
        tiled = coefficients.rows == basis.rows and coefficients.cols * basis.cols == spec.dense_count
        return cut and tiled and basis.cols == c * d and whole is None and not spec.transposed
    n, m = (spec.cols, spec.rows) if spec.transposed else (spec.rows, spec.cols)
    even = m % basis.cols == 0 and basis.rows % (m // basis.cols) == 0
    return even and (coefficients.rows, coefficients.cols) == (n, basis.rows)


def _widths(
    model: "PreTrainedModel",
    plain: "PreTrainedModel",
    part_of: "Callable[[Iterable[str]], tuple[Stack, Part]]",
    features: int | None,
) -> list[int] | None:
    """How many units, of so many inputs each, a part of every layer has; None where `plain`, which the model's own config makes, has the
    same, or no part is known, of which nobody narrows a layer then."""
    try:
        ours, said = (_columns(each, part_of) for each in (model, plain))
    except UnsupportedModel:
        return None
    return None if ours == said or features is None else [cols // features for cols in ours]


def _columns(model: "PreTrainedModel", part_of: "Callable[[Iterable[str]], tuple[Stack, Part]]") -> list[int]:
    """How many inputs the weight out of a part of each layer has."""
    columns = {path: handle.spec.cols for handle in weights(model).values() for path in handle.spec.paths}
    stack, part = part_of(columns)
    paths = (f"{stack.path}.{layer}.{part.out_of}" for layer in range(stack.count))
    return [columns[path] for path in paths if path in columns]


def _narrow(model: "PreTrainedModel", *, heads: Sequence[int] | None, neurons: Sequence[int] | None) -> None:
    """Give the layers of a model built from its config alone so many attention heads, and neurons."""
    from stackcomp.nn.keeping import keep_heads, keep_neurons  # which make models known to this module

    for left, part_of, keep in ((heads, attention_of, keep_heads), (neurons, feed_forward_of, keep_neurons)):
        if left is not None:
            paths = {id_: handle.spec.paths for id_, handle in weights(model).items()}
            out_of = between(*part_of(paths), paths)
            if len(left) != len(out_of):
                raise CheckpointError(
                    f"config.json: its quantization_config names widths of {len(left)} layers, the model has {len(out_of)}: save it again"
                )
            keep(model, {id_: range(width) for id_, width in zip(out_of, left, strict=True)})


def _cast(spec: WeightSpec, old: str, new: Coding) -> WeightSpec:
    """The spec after a cast of the model from dtype `old` to `new`; what has another dtype on purpose keeps
    it.
    """

    def cast(matrix: MatrixSpec) -> MatrixSpec:
        return replace(
            matrix,
            coding=new if matrix.coding == old else matrix.coding,
            scale_coding=new if matrix.scale_coding == old and not matrix.packed else matrix.scale_coding,
        )

    return replace(spec, matrices={part: cast(matrix) for part, matrix in spec.matrices.items()})


# Here, and not by the import hook: when this module is imported first, the hook runs in the middle of its imports.
register()
