"""The registry of tasks by their name in ``model.task``, one entry per task. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from adapeft.tasks.causal_lm import CausalLM
from adapeft.tasks.image_classification import ImageClassification
from adapeft.tasks.instruct.task import Instruct
from adapeft.tasks.masked_lm import MaskedLM
from adapeft.tasks.multi_label_classification import MultiLabelClassification
from adapeft.tasks.multiple_choice import MultipleChoice
from adapeft.tasks.seq2seq import Seq2Seq
from adapeft.tasks.sequence_classification import SequenceClassification
from adapeft.tasks.task import Task
from adapeft.tasks.token_classification import TokenClassification

TASKS: dict[str, Task[Any]] = {
    task.name: task
    for task in (
        SequenceClassification(),
        CausalLM(),
        Instruct(),
        MultiLabelClassification(),
        TokenClassification(),
        ImageClassification(),
        MultipleChoice(),
        Seq2Seq(),
        MaskedLM(),  # after Seq2Seq: transformers also lists encoder-decoders such as BART for masked words
    )
}

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]
