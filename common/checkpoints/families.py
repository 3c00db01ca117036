"""The table of Hugging Face families: model_type -> how its config and tensors are spelled.

Adding a family is adding an entry to one of the tables below.
"""

from common.checkpoints.families_decoder import DECODERS
from common.checkpoints.families_mobilenet import MOBILENET
from common.checkpoints.families_text import ENCODER_DECODERS, ENCODERS
from common.checkpoints.families_vision import VISION
from common.checkpoints.family import Family

FAMILIES: dict[str, Family] = DECODERS | ENCODERS | ENCODER_DECODERS | VISION | MOBILENET
