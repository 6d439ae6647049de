"""Names in the model of the tensors in a checkpoint: transformers renames, and sometimes fuses, them while loading."""

from __future__ import annotations

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

    def find(self, key: str) -> tuple[str | None, bool]:
        """Return (name in the model, whether the tensor itself is converted) for a checkpoint's ``key``.

        The name is None for tensors that the model does not have, such as another head.
        """
        name, converter = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and key in self._state:
            return key, False
        return (name, converter is not None) if name in self._state else (None, False)

    @property
    def are_stable(self) -> bool:
        """Whether a file with the model's own names loads unchanged: no rule mistakes one for a legacy name."""
        return all(self.find(name) == (name, False) for name in self._state)
