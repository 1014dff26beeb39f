from .callbacks.step_trace import StepTrace as StepTrace
from .data.items import ItemSizes as ItemSizes
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    CheckpointWriteError as CheckpointWriteError,
)
from .errors import (
    ConfigError as ConfigError,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    LayoutError as LayoutError,
)
from .errors import (
    MimoError as MimoError,
)
from .errors import (
    NonFiniteError as NonFiniteError,
)
from .errors import (
    ReplicaError as ReplicaError,
)
from .layout.layout import MimoLayout as MimoLayout
from .layout.module_parallelism import ModuleParallelism as ModuleParallelism
from .microbatch import Ragged as Ragged
from .microbatch import sum_by_sample as sum_by_sample
from .mimo.initialization import fan_in_normal_ as fan_in_normal_
from .mimo_parallel_utils import (
    build_pg_collection_for_schedule as build_pg_collection_for_schedule,
)
from .mimo_parallel_utils import (
    finalize_model_grads_multimodule as finalize_model_grads_multimodule,
)
from .mimo_parallel_utils import (
    get_module_to_grid_tuple as get_module_to_grid_tuple,
)
from .mimo_parallel_utils import (
    is_current_rank_in_grid as is_current_rank_in_grid,
)
from .mimo_parallel_utils import (
    multimodule_no_sync as multimodule_no_sync,
)
from .mimo_parallel_utils import (
    unwrap_mimo_model as unwrap_mimo_model,
)
from .mimo_parallel_utils import (
    validate_data_loader_contract as validate_data_loader_contract,
)
from .mimo_parallel_utils import (
    validate_no_stub_ranks as validate_no_stub_ranks,
)
from .mimo_parallel_utils import (
    zero_grad_buffer_for_multimodule as zero_grad_buffer_for_multimodule,
)
from .optim.lr_schedulers import PerModuleLR as PerModuleLR
from .optim.param_groups import OptimizerOverride as OptimizerOverride
from .parallel.infra import MimoModelInfra as MimoModelInfra
from .parallel.nccl import NcclGroupOptions as NcclGroupOptions
from .parallel.nccl import NcclOptions as NcclOptions
from .strategy.hugging_face import HuggingFaceModule as HuggingFaceModule
from .strategy.module import MimoModule as MimoModule
from .strategy.options import Checks as Checks
from .strategy.options import Monitoring as Monitoring
from .strategy.options import Saving as Saving
from .strategy.precision import MimoPrecision as MimoPrecision
from .strategy.strategy import MimoStrategy as MimoStrategy

__version__: str
