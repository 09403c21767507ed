"""The tables of names: what a config may say, and where it is found.

One line a thing. A value is ``"module:attribute"`` and is imported only when asked for, so that listing costs nothing
and no layer imports upwards. The first line of the object's docstring is what ``dfed list`` shows.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dfed.errors import ConfigError, DataError, DfedError, Fault

__all__ = [
    "ALL",
    "CODECS",
    "DATASETS",
    "METHODS",
    "MODELS",
    "PARTITIONERS",
    "SAMPLERS",
    "SERVER_OPTIMIZERS",
    "STRATEGIES",
    "WRAPPERS",
    "Registry",
    "UnknownName",
    "calling",
    "nearest",
]

_CHARACTERS = 300


class UnknownName(DfedError, KeyError):
    """A name that a registry does not know."""

    def __str__(self) -> str:
        return str(self.args[0])


def nearest(name: str, known: list[str]) -> str:
    """`` Did you mean 'x'?`` for a near miss, else the empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


class Registry:
    """Names of one kind of thing, resolved lazily.

    Args:
        kind: What it holds, in the singular, for messages.
        table: Name to ``"module:attribute"``.
    """

    def __init__(self, kind: str, table: dict[str, str]):
        self.kind = kind
        self._table = table

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._table))

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def get(self, name: str) -> Any:
        """The object called ``name``. A name ``package.module:attribute`` is imported as it stands.

        Raises:
            UnknownName: If there is no such name, or it cannot be imported; the message lists the known names and the
                nearest, or says why.
        """
        target = self._table.get(name)
        if target is None:
            if ":" not in name:
                known = list(self)
                allowed = ", ".join(known)
                raise UnknownName(f"must be one of {allowed}, but is {name!r}.{nearest(name, known)}")
            target = name
        module_name, _, attribute = target.partition(":")
        if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
            raise UnknownName(f"must be a known name, or have the form package.module:attribute, but is {target!r}.")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
            why = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
            raise UnknownName(f"must name a {self.kind} that can be imported, but '{target}' cannot: {why}.") from error

    def summary(self, name: str) -> str:
        """First line of the object's docstring."""
        return (self.get(name).__doc__ or "").strip().partition("\n")[0]


@contextmanager
def calling(field: str, name: str) -> Iterator[None]:
    """Around calls of the function that a config names in ``field``: what it raises is a fault of that field.

    Of a function of the user's own (``package.module:function``) that is anything, ``sys.exit`` included; of one of dfed's,
    where an unforeseen exception is a bug and keeps its traceback, a lack of memory and sizes that torch refuses.

    Raises:
        ConfigError: With type and text of the exception, and the line of the user's file where it came from.
        DataError: If it was one; names ``field`` and a function of the user's own.
    """
    own = ":" in name
    try:
        yield
    except DataError as error:
        if not own:
            raise
        raise DataError(f"`{field}` '{name}': {error}") from error
    except DfedError:
        raise
    except (Exception, SystemExit) as error:
        if not own and not isinstance(error, (MemoryError, OverflowError, RuntimeError)):
            raise
        said = (str(error).partition("\n")[0][:_CHARACTERS] or "no text").rstrip(".")
        raised = f"{type(error).__name__}: {said}{_place(error, name)}"
        raise ConfigError([Fault(field, f"must name a function that works here, but '{name}' raised {raised}.")]) from error


def _place(error: BaseException, name: str) -> str:
    """Where an exception came from, as `` (file:line)``: the innermost frame in the file of ``name``, or of all."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    frames = [frame for frame in frames if frame.filename == file] or list(frames)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


MODELS = Registry("model", {
    "cnn": "dfed.models.cnn:cnn",
    "densenet40": "dfed.models.densenet:densenet40",
    "mlp": "dfed.models.mlp:mlp",
    "mobilenet_v2": "dfed.models.mobilenet:mobilenet_v2",
    "resnet8": "dfed.models.cifar_resnet:resnet8",
    "resnet18": "dfed.models.resnet:resnet18",
    "resnet20": "dfed.models.cifar_resnet:resnet20",
    "resnet34": "dfed.models.resnet:resnet34",
    "resnet50": "dfed.models.resnet:resnet50",
    "resnet56": "dfed.models.cifar_resnet:resnet56",
    "vgg11_bn": "dfed.models.vgg:vgg11_bn",
    "vgg16_bn": "dfed.models.vgg:vgg16_bn",
    "vgg19_bn": "dfed.models.vgg:vgg19_bn",
    "vit_tiny": "dfed.models.vit:vit_tiny",
})
DATASETS = Registry("data set", {
    "cifar10": "dfed.data.torchvision_sets:cifar10",
    "cifar100": "dfed.data.torchvision_sets:cifar100",
    "digits": "dfed.data.digits:digits",
    "fashion_mnist": "dfed.data.torchvision_sets:fashion_mnist",
    "image_folder": "dfed.data.torchvision_sets:image_folder",
    "mnist": "dfed.data.torchvision_sets:mnist",
    "synthetic": "dfed.data.synthetic:synthetic",
})
PARTITIONERS = Registry("partitioner", {
    "dirichlet": "dfed.data.partition:dirichlet",
    "dirichlet_tiers": "dfed.data.partition:dirichlet_tiers",
    "fixed": "dfed.data.partition:fixed",
    "iid": "dfed.data.partition:iid",
    "quantity_skew": "dfed.data.partition:quantity_skew",
    "shards": "dfed.data.partition:shards",
})
STRATEGIES = Registry("strategy", {
    "allsmall": "dfed.strategies.allsmall:AllSmall",
    "cocofl": "dfed.strategies.cocofl:CoCoFL",
    "depthfl": "dfed.strategies.depthfl:DepthFL",
    "exclusivefl": "dfed.strategies.exclusivefl:ExclusiveFL",
    "fedavg": "dfed.strategies.fedavg:FedAvg",
    "feddropout": "dfed.strategies.feddropout:FedDropout",
    "fedclass": "dfed.strategies.fedclass:FedClass",
    "fedepth": "dfed.strategies.fedepth:FeDepth",
    "fedprox": "dfed.strategies.fedprox:FedProx",
    "fedrolex": "dfed.strategies.fedrolex:FedRolex",
    "fedsmall": "dfed.strategies.fedsmall:FedSmall",
    "fjord": "dfed.strategies.fjord:Fjord",
    "flextrain": "dfed.strategies.flextrain:FlexTrain",
    "heterofl": "dfed.strategies.heterofl:HeteroFL",
    "inclusivefl": "dfed.strategies.inclusivefl:InclusiveFL",
    "neulite": "dfed.strategies.neulite:NeuLite",
    "neuroflux": "dfed.strategies.neuroflux:NeuroFlux",
    "profl": "dfed.strategies.profl:ProFL",
    "progfed": "dfed.strategies.progfed:ProgFed",
    "scaffold": "dfed.strategies.scaffold:Scaffold",
    "smartfreeze": "dfed.strategies.smartfreeze:SmartFreeze",
})
WRAPPERS = Registry("wrapper", {
    "lips": "dfed.strategies.lips:Lips",
})
SAMPLERS = Registry("sampler", {
    "oort": "dfed.server.oort:Oort",
    "tifl": "dfed.server.tifl:TiFL",
    "uniform": "dfed.server.samplers:Uniform",
    "weighted": "dfed.server.samplers:Weighted",
})
SERVER_OPTIMIZERS = Registry("server optimiser", {
    "adam": "dfed.server.optimizers:adam",
    "momentum": "dfed.server.optimizers:momentum",
    "sgd": "dfed.server.optimizers:sgd",
    "yogi": "dfed.server.optimizers:yogi",
})
METHODS = Registry("method", {
    "bp": "dfed.central.bp:BP",
    "flextrain": "dfed.central.flextrain:CentralFlexTrain",
    "local": "dfed.central.local:ClassicLocal",
    "neuroflux": "dfed.central.neuroflux:NeuroFlux",
})
CODECS = Registry("codec", {
    "bf16": "dfed.comm.codecs:BF16",
    "bitmask": "dfed.comm.codecs:Bitmask",
    "fp16": "dfed.comm.codecs:FP16",
    "fp32": "dfed.comm.codecs:FP32",
    "int4": "dfed.comm.codecs:Int4",
    "int8": "dfed.comm.codecs:Int8",
    "int8_affine": "dfed.comm.codecs:AffineInt8",
    "qsgd": "dfed.comm.codecs:Stochastic",
    "random_k": "dfed.comm.codecs:RandomK",
    "top_k": "dfed.comm.codecs:TopK",
})
ALL = {
    "strategies": STRATEGIES,
    "wrappers of strategies": WRAPPERS,
    "methods of dfed train": METHODS,
    "models": MODELS,
    "data sets": DATASETS,
    "partitioners": PARTITIONERS,
    "samplers": SAMPLERS,
    "server optimisers": SERVER_OPTIMIZERS,
    "codecs": CODECS,
}
