from .chat.datamodule import ChatData as ChatData
from .chat.dataset import ChatDataset as ChatDataset
from .streams.dataset import StreamDataset as StreamDataset
from .streams.sampler import ShardSampler as ShardSampler
from .streams.shards import ParquetShards as ParquetShards
from .streams.shards import TarShards as TarShards
