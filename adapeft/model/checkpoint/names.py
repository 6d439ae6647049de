"""Names in the model of the tensors in a checkpoint: transformers renames, and sometimes fuses, them while loading."""

from __future__ import annotations

from copy import deepcopy

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class WeightNames:
    """The renaming that transformers applies for one model: base model prefixes and legacy names."""

    def __init__(self, structure: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(structure)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = structure.base_model_prefix
        self._state = structure.state_dict()

    def find(self, key: str) -> tuple[str | None, str | None]:
        """Return (name in the model, pattern of the converter that the tensor passes through) for a file's ``key``.

        The name is None for tensors that the model does not have, such as another head; the pattern is None for tensors
        that are used as they are stored. A converter with several targets has the name of the first.
        """
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and key in self._state:
            return key, None
        return (name, pattern) if name in self._state else (None, None)

    def converter(self, pattern: str) -> WeightConverter:
        """Return a new converter of the ``pattern`` that ``find`` returned."""
        # The last one, as in transformers, where it replaces an earlier one of the same pattern.
        return deepcopy(next(each for each in reversed(self._converters) if pattern in each.source_patterns))

    @property
    def unstable(self) -> str | None:
        """A name of the model under which a file does not load unchanged, because a rule takes it for a legacy one."""
        return next((name for name in self._state if self.find(name) != (name, None)), None)
