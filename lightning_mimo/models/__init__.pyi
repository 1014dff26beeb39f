from .audio import (
    AudioEncoder as AudioEncoder,
)
from .audio import (
    ClipPatches as ClipPatches,
)
from .audio import (
    PipelinedAudioSubmodules as PipelinedAudioSubmodules,
)
from .audio import (
    audio_spec as audio_spec,
)
from .encoder import encoder_spec as encoder_spec
from .gpt import gpt_spec as gpt_spec
from .multimodal import Encoder as Encoder
from .multimodal import multimodal_config as multimodal_config
from .patches import PatchEncoder as PatchEncoder
from .patches import PipelinedSubmodules as PipelinedSubmodules
from .sizes import Recompute as Recompute
from .sizes import TransformerSize as TransformerSize
from .sizes import transformer_config as transformer_config
from .vision import (
    ImagePatches as ImagePatches,
)
from .vision import (
    PipelinedVisionSubmodules as PipelinedVisionSubmodules,
)
from .vision import (
    VisionEncoder as VisionEncoder,
)
from .vision import (
    vision_spec as vision_spec,
)
from .vision_language import vision_language_config as vision_language_config
