from .config_values import refuse as refuse
from .decoder import TextModel as TextModel
from .decoder import text_model as text_model
from .llama import llama_size as llama_size
from .registry import PretrainedModel as PretrainedModel
from .registry import register as register
from .towers import register_tower as register_tower
