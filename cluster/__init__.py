"""Distributed execution with local processes or Ray, and DeepSpeed ZeRO. Code of the ranks does not import Ray."""

import logging

# peft imports bitsandbytes wherever it is installed, which on CPUs with bfloat16 warns on every start that an optional
# kernel could not be downloaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
