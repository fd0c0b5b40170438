"""Where a decoder's components come from: a diffusers folder, read one component at a time, or objects in memory.

A folder holds one subfolder per component (``unet/``, ``vae/``, ``text_encoder/``, ``tokenizer/``, ``scheduler/``) and
may hold ``mmbridge.json`` with defaults for sampling and the licence: ``{"steps": 20, "guidance": 3.0, "licence":
"..."}``, and what else a decoder's class names. Weights are read from safetensors only; pickled weights are deliberately not read.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import re
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmbridge import hub
from mmbridge.errors import CheckpointError

log = logging.getLogger("mmbridge")

_CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
_CONFIGS["tokenizer_2"] = _CONFIGS["tokenizer"]
# The plain name, sharded or not: a folder may hold other variants (".fp16.", ".non_ema.") beside it.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_shared: weakref.WeakValueDictionary[tuple[str, str], nn.Module] = weakref.WeakValueDictionary()
_announced: set[str] = set()


class Folder:
    """The components of a diffusers folder; nothing is read before it is asked for.

    Args:
        source: Shipped name, local folder or hub id.
        classes: Component names to the classes of its modules ("diffusers.AutoencoderKL"); None where the component's
            own files name the class (tokenizers and schedulers).
        revision: Branch, tag or commit of a hub repository.
    """

    def __init__(self, source: str | Path, classes: dict[str, str | None], revision: str | None = None):
        self.source: str | None = str(source)
        self.classes = classes
        self._revision = revision
        # A model that is only planned, on the meta device, needs no weights and so no download.
        self._planned = torch.get_default_device().type == "meta"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components."""
        return tuple(self.classes)

    @cached_property
    def path(self) -> Path:
        """The local folder, downloaded if need be.

        Raises:
            CheckpointError: There is none.
        """
        path = hub.resolve(str(self.source), self._revision)
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is a file; a decoder is loaded from a diffusers folder with {', '.join(self.names)}."
            )
        return path

    @property
    def _configs(self) -> Path:
        """A folder with all JSON files, which needs no weights where the decoder is only planned."""
        return hub.resolve_config(str(self.source)) if self._planned else self.path

    def config(self, name: str) -> dict[str, Any]:
        """Return a component's configuration.

        Raises:
            CheckpointError: It is missing or not JSON.
        """
        folder = self._configs
        config = hub.read_json(folder / name / _CONFIGS.get(name, "config.json"))
        if not isinstance(config, dict):
            raise CheckpointError(f"the configuration of {name} in {folder} is not a JSON object; restore it.")
        return config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The folder's own defaults, from its optional ``mmbridge.json``.

        Raises:
            CheckpointError: The file is damaged.
        """
        file = self._configs / "mmbridge.json"
        settings = hub.read_json(file) if file.exists() else {}
        if not isinstance(settings, dict) or not all(
            isinstance(settings.get(key, 1), int | float) for key in ("steps", "guidance", "seconds", "frames", "fps")
        ):
            raise CheckpointError(
                f'{file} must hold an object such as {{"steps": 20, "guidance": 3.0, "licence": "MIT"}}.'
            )
        return settings

    @property
    def licence(self) -> str:
        """SPDX name of the licence, or "unknown"."""
        return str(self.settings.get("licence") or hub.licence_of(self.path))

    @property
    def revision(self) -> str | None:
        """Commit of the hub repository that the folder is a snapshot of, None for other folders."""
        parts = self.path.parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else self._revision

    def files(self, name: str) -> list[Path]:
        """Return the files that a component is loaded from.

        Raises:
            CheckpointError: The weights are missing.
        """
        folder = self.path / name
        if self.classes[name] is None:
            return sorted(file for file in folder.glob("*") if file.is_file())
        weights = sorted(file for file in folder.glob("*.safetensors") if _WEIGHTS.fullmatch(file.name))
        if not weights:
            raise CheckpointError(
                f"decoder {self.source!r} has no weights for its {name}: there is no *.safetensors in {folder}; "
                "restore the file from its source (pickled .bin weights are not read: save them again as safetensors)."
            )
        return [folder / "config.json", *weights]

    def sha256(self, *names: str) -> str:
        """Return one SHA-256 over the files of some components."""
        digest = hashlib.sha256()
        for name in names:
            for file in self.files(name):
                digest.update(f"{name}/{file.name} {hub.file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def load(self, name: str, dtype: torch.dtype, device: torch.device) -> Any:
        """Load a component; a module with equal weights that is in memory already is shared.

        Where the decoder is only planned, modules are made on the meta device from their configurations.

        Raises:
            CheckpointError: Files are missing, damaged or do not fit their configuration.
        """
        config = self.config(name)
        planned = self.classes[name]
        if self._planned and planned is not None:
            return self._plan_module(name, planned, config, dtype)
        if str(self.source) not in _announced:
            _announced.add(str(self.source))
            log.info("%s: licence %s", self.source, self.licence)
        class_name = self.classes[name]
        if class_name is None:
            return self._create_scheduler(config) if name == "scheduler" else self._load_tokenizer(name)
        key = (class_name, self.sha256(name))
        module = _shared.get(key)
        # Whoever else uses it may have moved or cast it since it was loaded.
        if module is None or (module.dtype, module.device) != (dtype, device):
            _shared[key] = module = self._load_module(name, class_name, dtype).to(device)
        return module

    def _load_module(self, name: str, class_name: str, dtype: torch.dtype) -> nn.Module:
        library, _, qualifier = class_name.partition(".")
        options: dict[str, Any] = {"dtype" if library == "transformers" else "torch_dtype": dtype}
        with _loading(self.path / name):
            module, report = getattr(importlib.import_module(library), qualifier).from_pretrained(
                self.path / name,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are in the report, to be refused below
                **options,
            )
        problems = [f"{key} is missing" for key in sorted(report["missing_keys"])]
        problems += [f"{key} is not part of the model" for key in sorted(report["unexpected_keys"])]
        problems += [
            f"{key} has shape {tuple(found)} instead of {tuple(wanted)}"
            for key, found, wanted in sorted(report["mismatched_keys"])
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise CheckpointError(
                f"the weights of {name} in {self.path} do not fit its config.json: {'; '.join(problems[:4])}{more}; "
                "restore the weights or the configuration from their source."
            )
        return module  # type: ignore[no-any-return]

    def _plan_module(self, name: str, class_name: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        library, _, qualifier = class_name.partition(".")
        created: Any = getattr(importlib.import_module(library), qualifier)
        with _loading(hub.resolve_config(str(self.source)) / name), torch.device("meta"):
            if library == "transformers":
                return created(created.config_class.from_dict(config)).to(dtype)  # type: ignore[no-any-return]
            return created.from_config(config).to(dtype)  # type: ignore[no-any-return]

    def _load_tokenizer(self, name: str) -> Any:
        from transformers import AutoTokenizer

        with _loading(self.path / name):
            return AutoTokenizer.from_pretrained(self.path / name, local_files_only=True)

    def _create_scheduler(self, config: dict[str, Any]) -> Any:
        import diffusers

        created: Any = getattr(diffusers, str(config.get("_class_name")), None)
        known = isinstance(created, type) and issubclass(created, diffusers.SchedulerMixin)
        if not known:
            raise CheckpointError(
                f"the scheduler of {self.path} is a {config.get('_class_name')!r}, which is not a scheduler of "
                f"diffusers {diffusers.__version__}; name one in scheduler/scheduler_config.json under '_class_name'."
            )
        with _loading(self.path / "scheduler"):
            return created.from_config(config)


class Given:
    """Components that are in memory already.

    Args:
        components: Names to objects.
    """

    source: str | None = None
    revision: str | None = None
    licence = "unknown"

    def __init__(self, components: dict[str, Any]):
        self.components = components
        self.settings: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components."""
        return tuple(self.components)

    def config(self, name: str) -> dict[str, Any]:
        """Return a component's configuration."""
        component = self.components[name]
        if name.startswith("tokenizer"):
            return {"model_max_length": component.model_max_length}
        return component.config.to_dict() if hasattr(component.config, "to_dict") else dict(component.config)

    def load(self, name: str, dtype: torch.dtype, device: torch.device) -> Any:
        """Return a component; modules are moved and cast in place."""
        component = self.components[name]
        return component.to(device=device, dtype=dtype) if isinstance(component, nn.Module) else component

    def sha256(self, *names: str) -> str:
        """Return one SHA-256 over configurations, weights and vocabularies."""
        digest = hashlib.sha256()
        for name in names:
            component = self.components[name]
            digest.update(f"{name} {type(component).__qualname__}".encode())
            digest.update(json.dumps(self.config(name), sort_keys=True, default=str).encode())
            if isinstance(component, nn.Module):
                for key, tensor in sorted(component.state_dict().items()):
                    digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            elif name.startswith("tokenizer"):
                facts = json.loads(component.backend_tokenizer.to_str())
                # These two only echo the latest call.
                digest.update(json.dumps({**facts, "padding": None, "truncation": None}, sort_keys=True).encode())
        return digest.hexdigest()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' reports and bars off the screen."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(logging.CRITICAL)  # it logs as an error, besides raising it, that a file is missing
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Keep the libraries quiet, and turn whatever a loader raises into one sentence."""
    try:
        with quiet_libraries():
            yield
    except MemoryError:
        raise
    except Exception as error:  # the loaders raise anything from OSError to SafetensorError on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise CheckpointError(
            f"{folder} can't be loaded: its files are damaged, incomplete or of another kind ({reason}); restore them "
            "from their source."
        ) from error
